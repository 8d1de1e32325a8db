"""What BART's encoder does about overflow, in a graph without branches."""

import numpy as np
import onnxruntime
import pytest
import torch
from attnserve_export import graphs
from attnserve_export.checkpoints.overflow import BothBranches
from torch import Tensor, nn


class Clamping(nn.Module):
    """As the layers of transformers' BART do it in FP16, twice."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        with BothBranches():
            return self.clamped(self.clamped(hidden_states) / 2)

    @staticmethod
    def clamped(hidden_states: Tensor) -> Tensor:
        """All values are kept, unless one of them is not finite."""
        if hidden_states.dtype == torch.float16 and not torch.isfinite(hidden_states).all():
            clamp_value = torch.finfo(hidden_states.dtype).max - 1000
            hidden_states = torch.clamp(hidden_states, min=-clamp_value, max=clamp_value)
        return hidden_states


@pytest.mark.parametrize(
    "values",
    [[1.0, -2.0], [65504.0, 3.0], [40000.0, 1.0], [np.inf, 3.0], [-np.inf, 65504.0], [np.nan, 4]],
)
def test_values_are_those_of_the_branch_that_pytorch_takes(values: list[float]) -> None:
    given = torch.tensor([values], dtype=torch.float16)
    inputs = [graphs.Input("hidden_states", torch.ones(1, 3, dtype=torch.float16), (1, "length"))]
    model = graphs.export(Clamping(), inputs, ["output"], 23)
    (output,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"hidden_states": given.numpy()}
    )
    expected = Clamping.clamped(Clamping.clamped(given) / 2)
    np.testing.assert_array_equal(output, expected.numpy())
