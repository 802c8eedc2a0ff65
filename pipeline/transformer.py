"""One forward for all sequences of a step, of any mix of sizes and timesteps.

It computes what ``OvisImageTransformer2DModel.forward`` computes, with that model's own weights. Linear layers run over
the tokens of all sequences at once; modulation and RoPE are looked up for each token; attention stays inside each
sequence. So a sequence's velocity does not depend on who shares its forward, up to the rounding of a matrix product
of another shape; alone, it is upstream's to the bit (on a CPU, uncompiled).

Shapes: tokens [T, D] of all sequences, one after the other; H heads of width d = D / H. In the double-stream blocks
text and image tokens are two such streams; in the single-stream blocks each sequence's text goes before its image.

What upstream computes anew in every forward is kept: RoPE for each size, AdaLN for each timestep (``modulation.py``),
a prompt's first layers (``read``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from diffusers import OvisImageTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from pipeline.attention import Attention, Heads, Spans
from pipeline.fp8 import Fp8Linear
from pipeline.modulation import Modulations
from pipeline.noise import positions
from pipeline.prompt import TEXT_TOKENS

LAYOUTS_REMEMBERED = 8  # 34 MB each for 16,000 tokens
SIZES_REMEMBERED = 64  # 4 MB each for 1024²

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [T, d] in float32


@dataclass(frozen=True)
class Branch:
    """A sequence at one step: one branch, with or without the prompt, of one image."""

    latents: torch.Tensor  # [height/2 · width/2, channels]
    text: torch.Tensor  # [256, D], from ``PackedTransformer.read``
    timestep: float  # 0 to 1000, rounded to the model's dtype
    height: int  # in latents
    width: int


class PackedTransformer:
    """The packed forward of one model. Its owner's thread alone may use it, under ``torch.inference_mode``.

    ``compiled``: the parts of a block before and after its attention are compiled, once for all blocks and all sizes,
    when they first run. It rounds differently, so pictures are then near upstream's, not equal.
    """

    def __init__(
        self, transformer: OvisImageTransformer2DModel, modulations: Modulations, *, compiled: bool = False
    ) -> None:
        self.attention = Attention()
        self._transformer = transformer
        self._modulations = modulations
        self._doubles = [(_image_half(block), _text_half(block)) for block in transformer.transformer_blocks]
        self._singles = [_single(block) for block in transformer.single_transformer_blocks]
        self._layout = lru_cache(LAYOUTS_REMEMBERED)(self._make_layout)
        self._rotary = lru_cache(SIZES_REMEMBERED)(self._make_rotary)
        if transformer.device.type == "cuda":
            torch.cuda.empty_cache()  # what fusing left are pieces that nothing fits into
        made = partial(torch.compile, dynamic=True) if compiled else _as_it_is
        self._into_double, self._out_of_double = made(_into_double), made(_out_of_double)
        self._into_single, self._out_of_single = made(_into_single), made(_out_of_single)

    def choose_attention(self) -> dict[str, dict[str, float]]:
        """Measure which way of attention is the fastest here, and take it; see ``Attention.measure``."""
        model = self._transformer
        heads, width = model.config.num_attention_heads, model.config.attention_head_dim
        return self.attention.measure(heads, width, model.device, model.dtype)

    def read(self, embedding: torch.Tensor) -> torch.Tensor:
        """A prompt's embedding [256, C] as the blocks take it, [256, D]."""
        text: torch.Tensor = self._transformer.context_embedder(self._transformer.context_embedder_norm(embedding))
        return text

    def __call__(self, pack: Sequence[Branch]) -> list[torch.Tensor]:
        """The velocity [tokens, channels] of each sequence of ``pack``, in its order.

        Sequences of equal size should be neighbours: their attention is then one call.
        """
        timesteps = sorted({branch.timestep for branch in pack})
        modulation = self._modulations.of(timesteps)
        layout = self._layout(tuple((one.height, one.width, timesteps.index(one.timestep)) for one in pack))
        text = torch.cat([branch.text for branch in pack])
        image = self._transformer.x_embedder(torch.cat([branch.latents for branch in pack]))
        for image_half, text_half in self._doubles:
            image, text = self._double_block(
                image_half, text_half, image, text, next(modulation), next(modulation), layout
            )
        tokens = layout.joined(text, image)
        for single in self._singles:
            tokens = self._single_block(single, tokens, next(modulation), layout)
        _, image = layout.parted(tokens)
        velocity = _last_layer(self._transformer, image, next(modulation), layout.image)
        return list(torch.split(velocity, layout.lengths))

    def _double_block(
        self,
        image_half: "Half",
        text_half: "Half",
        image: torch.Tensor,
        text: torch.Tensor,
        image_said: torch.Tensor,
        text_said: torch.Tensor,
        layout: "Layout",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Follows OvisImageTransformerBlock.forward and OvisImageAttnProcessor."""
        of_text = self._into_double(text_half, text, text_said, layout.text)
        of_image = self._into_double(image_half, image, image_said, layout.image)
        queries, keys, values = map(layout.joined, of_text, of_image)
        attended = self.attention((queries, keys, values), layout.spans)
        text_attended, image_attended = layout.parted(attended)
        return (
            self._out_of_double(image_half, image, image_attended, image_said, layout.image),
            self._out_of_double(text_half, text, text_attended, text_said, layout.text),
        )

    def _single_block(
        self, single: "Single", tokens: torch.Tensor, said: torch.Tensor, layout: "Layout"
    ) -> torch.Tensor:
        """Follows OvisImageSingleTransformerBlock.forward."""
        heads, mlp = self._into_single(single, tokens, said, layout.joint)
        attended = self.attention(heads, layout.spans)
        left: torch.Tensor = self._out_of_single(single, tokens, attended, mlp, said, layout.joint)
        return left

    def _make_layout(self, sequences: tuple[tuple[int, int, int], ...]) -> "Layout":
        """The layout of sequences given as (height, width, row of the modulation)."""
        lengths = [height * width // 4 for height, width, _ in sequences]
        spans = Spans(tuple(TEXT_TOKENS + length for length in lengths), self._transformer.device)
        rows = [row for _, _, row in sequences]
        rotary = [self._rotary(height, width) for height, width, _ in sequences]
        return Layout(
            lengths,
            spans,
            text=self._stream(rows, [(cosines[:TEXT_TOKENS], sines[:TEXT_TOKENS]) for cosines, sines in rotary]),
            image=self._stream(rows, [(cosines[TEXT_TOKENS:], sines[TEXT_TOKENS:]) for cosines, sines in rotary]),
            joint=self._stream(rows, rotary),
        )

    def _stream(self, rows: Sequence[int], rotary: Sequence[Rotary]) -> "Stream":
        cosines, sines = zip(*rotary, strict=True)
        lengths = torch.tensor([len(one) for one in cosines])
        row_of_token = torch.repeat_interleave(torch.tensor(rows), lengths).to(self._transformer.device)
        return Stream(row_of_token, (torch.cat(cosines), torch.cat(sines)))

    def _make_rotary(self, height: int, width: int) -> Rotary:
        """RoPE of one sequence, as upstream computes it from where its tokens stand."""
        model = self._transformer
        order = torch.arange(TEXT_TOKENS)
        text = torch.stack((torch.zeros_like(order), order, order), dim=-1).to(model.device, model.dtype)
        image = positions(height=height, width=width, device=model.device, dtype=model.dtype)
        cosines, sines = model.pos_embed(torch.cat((text, image)))
        return cosines, sines


@dataclass(frozen=True)
class Stream:
    """What each token of a stream looks up."""

    row_of_token: torch.Tensor  # [T], of the modulation
    rotary: Rotary

    def spread(self, said: torch.Tensor) -> torch.Tensor:
        """Modulation [timesteps, W] to what fits the tokens: [T, W], or [1, W] if all have the one timestep."""
        return said if len(said) == 1 else said.index_select(0, self.row_of_token)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a pack stand. It depends on sizes, and on who shares a timestep: so it serves many steps."""

    lengths: list[int]  # image tokens of each sequence
    spans: Spans  # all tokens of each sequence
    text: Stream
    image: Stream
    joint: Stream

    def joined(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Two streams to one, in which each sequence's text goes before its image."""
        pairs = zip(torch.split(text, TEXT_TOKENS), torch.split(image, self.lengths), strict=True)
        return torch.cat(list(chain.from_iterable(pairs)))

    def parted(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of ``joined``: text, image."""
        parts = torch.split(tokens, [length for image in self.lengths for length in (TEXT_TOKENS, image)])
        return torch.cat(parts[::2]), torch.cat(parts[1::2])


@dataclass(frozen=True)
class Half:
    """One stream's layers of a double-stream block."""

    norm: nn.Module
    to_qkv: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    to_out: nn.Module
    norm_mlp: nn.Module
    mlp: nn.Module
    heads: int


@dataclass(frozen=True)
class Single:
    """The layers of a single-stream block."""

    norm: nn.Module
    to_qkv_mlp: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    to_out: nn.Module
    heads: int
    width: int


def _into_double(half: Half, tokens: torch.Tensor, said: torch.Tensor, stream: Stream) -> Heads:
    shift, scale = (stream.spread(part) for part in said.chunk(6, dim=-1)[:2])
    normed = half.norm(tokens) * (1 + scale) + shift
    return _heads(half, half.to_qkv(normed), stream.rotary)


def _out_of_double(
    half: Half, tokens: torch.Tensor, attended: torch.Tensor, said: torch.Tensor, stream: Stream
) -> torch.Tensor:
    gate, shift_mlp, scale_mlp, gate_mlp = (stream.spread(part) for part in said.chunk(6, dim=-1)[2:])
    tokens = tokens + gate * half.to_out(attended)
    normed = half.norm_mlp(tokens) * (1 + scale_mlp) + shift_mlp
    left: torch.Tensor = tokens + gate_mlp * half.mlp(normed)
    return left


def _into_single(
    single: Single, tokens: torch.Tensor, said: torch.Tensor, stream: Stream
) -> tuple[Heads, torch.Tensor]:
    """Heads, and the MLP's inside [T, M]."""
    shift, scale = (stream.spread(part) for part in said.chunk(3, dim=-1)[:2])
    normed = single.norm(tokens) * (1 + scale) + shift
    projected = single.to_qkv_mlp(normed)
    qkv, mlp = projected.tensor_split([3 * single.width], dim=-1)
    mlp, mlp_gate = mlp.chunk(2, dim=-1)
    return _heads(single, qkv, stream.rotary), nn.functional.silu(mlp_gate) * mlp


def _out_of_single(
    single: Single,
    tokens: torch.Tensor,
    attended: torch.Tensor,
    mlp: torch.Tensor,
    said: torch.Tensor,
    stream: Stream,
) -> torch.Tensor:
    gate = stream.spread(said.chunk(3, dim=-1)[2])
    left: torch.Tensor = tokens + gate * single.to_out(torch.cat([attended, mlp], dim=-1))
    return left


def _last_layer(
    model: OvisImageTransformer2DModel, image: torch.Tensor, said: torch.Tensor, stream: Stream
) -> torch.Tensor:
    """Follows AdaLayerNormContinuous.forward, where scale goes before shift."""
    scale, shift = (stream.spread(part) for part in said.chunk(2, dim=-1))
    velocity: torch.Tensor = model.proj_out(model.norm_out.norm(image) * (1 + scale) + shift)
    return velocity


def _heads(layers: Half | Single, qkv: torch.Tensor, rotary: Rotary) -> Heads:
    """[T, 3D] to queries and keys, normed and turned, and values."""
    queries, keys, values = torch.unflatten(qkv, -1, (3, layers.heads, -1)).unbind(1)
    return _turned(layers.norm_q(queries), rotary), _turned(layers.norm_k(keys), rotary), values


def _turned(heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    turned: torch.Tensor = apply_rotary_emb(heads[None], rotary, sequence_dim=1)[0]
    return turned


def _image_half(block: Any) -> Half:
    attention = block.attn
    return Half(
        norm=block.norm1.norm,
        to_qkv=_fused([attention.to_q, attention.to_k, attention.to_v]),
        norm_q=attention.norm_q,
        norm_k=attention.norm_k,
        to_out=attention.to_out[0],
        norm_mlp=block.norm2,
        mlp=block.ff,
        heads=attention.heads,
    )


def _text_half(block: Any) -> Half:
    attention = block.attn
    return Half(
        norm=block.norm1_context.norm,
        to_qkv=_fused([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]),
        norm_q=attention.norm_added_q,
        norm_k=attention.norm_added_k,
        to_out=attention.to_add_out,
        norm_mlp=block.norm2_context,
        mlp=block.ff_context,
        heads=attention.heads,
    )


def _single(block: Any) -> Single:
    attention = block.attn
    return Single(
        norm=block.norm.norm,
        to_qkv_mlp=_fused([attention.to_q, attention.to_k, attention.to_v, block.proj_mlp]),
        norm_q=attention.norm_q,
        norm_k=attention.norm_k,
        to_out=block.proj_out,
        heads=attention.heads,
        width=attention.inner_dim,
    )


Linear = nn.Linear | Fp8Linear


def _fused(linears: Sequence[Linear]) -> Linear:
    """One linear layer that gives all outputs side by side. The given ones become views of its weights, not copies."""
    fused = type(linears[0])(linears[0].in_features, sum(one.out_features for one in linears), device="meta")
    for name, _ in list(fused.named_parameters()):
        setattr(fused, name, _side_by_side(linears, name))
    return fused


def _side_by_side(linears: Sequence[Linear], name: str) -> nn.Parameter:
    parameters = [linear.get_parameter(name).data for linear in linears]
    whole = _already_side_by_side(parameters)
    if whole is None:
        whole = torch.cat(parameters)
        for linear, part in zip(linears, torch.split(whole, [len(one) for one in parameters]), strict=True):
            setattr(linear, name, nn.Parameter(part, requires_grad=False))
    return nn.Parameter(whole, requires_grad=False)


def _already_side_by_side(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The whole, if an earlier engine on these weights has fused them."""
    first = parameters[0]
    rows = sum(len(one) for one in parameters)
    starts = [one.data_ptr() for one in parameters[1:]]
    ends = [one.data_ptr() + one.nbytes for one in parameters[:-1]]
    if starts != ends or first.untyped_storage().nbytes() != rows * first[0].nbytes:
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _as_it_is(function: Any) -> Any:
    return function
