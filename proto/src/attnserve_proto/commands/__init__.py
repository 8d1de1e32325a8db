"""What all commands of attnserve do alike: options, errors, interrupts, progress, files.

access     how a server is reached: TLS, certificates, tokens
values     readers of options, each with the range that it allows
running    a parser that says one line, and what every `main` runs its work in
files      written beside, then renamed; said at once where that cannot be
progress   how far a command is, and how long it still takes
extensions what a distribution adds to another's commands, if it is installed
"""

from attnserve_proto.commands.access import PLAIN, Access, access_of, add_access
from attnserve_proto.commands.extensions import add_missing_command, extension
from attnserve_proto.commands.files import check_file, check_folder, replacing
from attnserve_proto.commands.progress import Progress
from attnserve_proto.commands.running import CommandError, Parser, run
from attnserve_proto.starting import INTERRUPTED, Loading, Silence

__all__ = [
    "INTERRUPTED",
    "PLAIN",
    "Access",
    "CommandError",
    "Loading",
    "Parser",
    "Progress",
    "Silence",
    "access_of",
    "add_access",
    "add_missing_command",
    "check_file",
    "check_folder",
    "extension",
    "replacing",
    "run",
]
