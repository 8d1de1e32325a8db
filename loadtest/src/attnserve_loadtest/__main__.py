"""`python -m attnserve_loadtest`."""

from attnserve_loadtest.start import main

if __name__ == "__main__":
    raise SystemExit(main())
