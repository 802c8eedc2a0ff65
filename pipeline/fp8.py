"""Linear layers whose products are taken in 8 bits: an option for speed, never the default.

Weights are kept in float8 (e4m3) with one scale for each output; what comes in is rounded to float8 with one scale for
each token, at every call. The sums are in higher precision, the answer is bfloat16. So the large layers need half the
memory and, on a device with float8 units (compute capability 8.9 and later), about half the time. Pictures are near
those of bf16, not equal to them: README says how near.

Only the blocks' own linear layers are changed. Embeddings, AdaLN and the last layer are small, and move the whole
picture.
"""

import torch
from diffusers import OvisImageTransformer2DModel
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from pipeline.errors import DeviceError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
OLDEST_CAPABILITY = (8, 9)
KEPT = "norm"  # in the names of the layers that stay as they are


class Fp8Linear(nn.Module):
    """A linear layer in float8. ``weight`` [out, in], ``scale`` [out, 1] in float32, ``bias`` [out] in bfloat16."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _fixed(torch.empty(out_features, in_features, dtype=FLOAT8, device=device))
        self.scale = _fixed(torch.empty(out_features, 1, dtype=torch.float32, device=device))
        self.bias = _fixed(torch.empty(out_features, dtype=torch.bfloat16, device=device))

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        """The same layer, its weights rounded."""
        rounded = cls(linear.in_features, linear.out_features, device="meta")
        weight, scale = _rounded(linear.weight.data)
        rounded.weight, rounded.scale, rounded.bias = _fixed(weight), _fixed(scale), _fixed(linear.bias.data)
        return rounded

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], both bfloat16."""
        tokens, scale = _rounded(inputs.flatten(0, -2))
        outputs: torch.Tensor = scaled_mm(
            tokens,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale.t(),
            ScalingType.RowWise,
            bias=self.bias,
            output_dtype=torch.bfloat16,
            use_fast_accum=True,  # on Hopper the exact sums take twice as long
        )
        return torch.unflatten(outputs, 0, inputs.shape[:-1])


def check(device: torch.device) -> None:
    """Raise DeviceError if ``device`` has no float8 units. A CPU takes float8 products slowly, for tests."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        raise DeviceError(f"{torch.cuda.get_device_name(device)} has no float8 units: draw in bf16")


def quantise(transformer: OvisImageTransformer2DModel) -> None:
    """Put an Fp8Linear in the place of every linear layer of the blocks of a bfloat16 model, one after the other."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            if not name.startswith(KEPT):
                block.set_submodule(name, Fp8Linear.of(linear))


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] to float8 and one scale for each row, [rows, 1] in float32."""
    largest = matrix.abs().amax(dim=-1, keepdim=True).to(torch.float32)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (matrix.to(torch.float32) / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
