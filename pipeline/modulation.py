"""What the AdaLN layers of a transformer say at each timestep: computed once, kept in a bounded table.

Every block scales, shifts and gates its tokens by numbers that depend on the timestep alone. The layers that give them
are a fifth of the 7B model's weights (1.46 B of them), and the timesteps come again with every image.

One timestep's *row* holds the outputs of all of these layers, in the order in which the forward asks for them: 0.95 MB
for the 7B model. In bf16 a timestep has so few values that all their rows (0.85 GB) are smaller than the weights
(2.9 GB): ``replace_layers`` puts them in the weights' place, for cards with little memory.

Invariant: a row is computed alone, by upstream's own modules, so it is upstream's to the bit whoever asks for it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import OvisImageTransformer2DModel
from torch import nn

REMEMBERED = 1024  # more than bf16 has timesteps to ask for: nothing is ever computed twice, in at most 0.9 GB
HIGHEST = 1000.0


class Modulations:
    """The table of one transformer."""

    def __init__(self, transformer: OvisImageTransformer2DModel, remembered: int = REMEMBERED) -> None:
        self._transformer = transformer
        self._remembered = remembered
        self._rows: OrderedDict[float, torch.Tensor] = OrderedDict()
        self._widths = [norm.linear.out_features for norm in _norms(transformer)]

    def of(self, timesteps: Sequence[float]) -> Iterator[torch.Tensor]:
        """For each AdaLN layer, in the forward's order, its outputs [timesteps, width].

        A timestep is 0 to 1000, rounded to the model's dtype: as it is before OvisImagePipeline divides it by 1000.
        """
        rows = torch.stack([self._row(timestep) for timestep in timesteps])
        # Copies: where a view starts in the row would be one more thing that a block is compiled for.
        return iter([said.clone() for said in torch.split(rows, self._widths, dim=1)])

    @torch.inference_mode()
    def replace_layers(self, device: torch.device, *, lowest: float) -> None:
        """Compute every row from timestep ``lowest`` on, on ``device``, and drop the layers. For bfloat16 alone.

        Layer by layer, so that no more than one of them is on ``device`` beside the table.
        """
        model = self._transformer
        assert model.dtype == torch.bfloat16
        model.timestep_embedder.to(device)
        timesteps = _bfloat16_between(lowest, HIGHEST)
        said = [self._silenced(timestep) for timestep in timesteps]
        table = torch.cat([_said_by(norm.linear.to(device), said, norm) for norm in _norms(model)], dim=1)
        self._rows = OrderedDict(zip(timesteps, table, strict=True))
        self._remembered = len(timesteps)

    def _row(self, timestep: float) -> torch.Tensor:
        if timestep in self._rows:
            self._rows.move_to_end(timestep)
            return self._rows[timestep]
        silenced = self._silenced(timestep)
        row = self._rows[timestep] = torch.cat([norm.linear(silenced)[0] for norm in _norms(self._transformer)])
        if len(self._rows) > self._remembered:
            self._rows.popitem(last=False)
        return row

    def _silenced(self, timestep: float) -> torch.Tensor:
        """[1, D], which every AdaLN layer is given. Follows OvisImageTransformer2DModel.forward and AdaLayerNormZero.

        Divided and multiplied as upstream does it, for in bf16 that does not always give the same number back.
        """
        model = self._transformer
        weight = model.timestep_embedder.linear_1.weight
        seen = torch.tensor([timestep], device=weight.device, dtype=weight.dtype) / 1000 * 1000
        embedding: torch.Tensor = model.timestep_embedder(model.time_proj(seen).to(weight.dtype))
        return nn.functional.silu(embedding)


def _norms(transformer: OvisImageTransformer2DModel) -> Iterator[Any]:
    """Every AdaLN layer, in the order in which the forward asks for them."""
    for block in transformer.transformer_blocks:
        yield block.norm1
        yield block.norm1_context
    for block in transformer.single_transformer_blocks:
        yield block.norm
    yield transformer.norm_out


def _said_by(linear: nn.Linear, inputs: Sequence[torch.Tensor], norm: Any) -> torch.Tensor:
    """[inputs, width], after which ``norm`` has no layer any more. One by one, for the bits of one alone."""
    said = torch.cat([linear(one) for one in inputs])
    norm.linear = None
    return said


def _bfloat16_between(lowest: float, highest: float) -> list[float]:
    """Every number that bf16 has there, both ends included."""
    first, last = (torch.tensor(end, dtype=torch.bfloat16).view(torch.int16).item() for end in (lowest, highest))
    values: list[float] = torch.arange(first, last + 1, dtype=torch.int16).view(torch.bfloat16).tolist()
    return values
