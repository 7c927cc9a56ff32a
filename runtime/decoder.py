"""Drives an exported language model: prefill and single steps over its KV cache.

The graph's contract: inputs input_ids (B, S), attention_mask (B, P + S), position_ids (B, S), of
which the last two may be missing, and past_key_values.N.key / .value (B, kv_heads, P, head_dim);
outputs logits (B, S, V) and present.N.key / .value (B, kv_heads, P + S, head_dim). P may be 0. A
model without a cache is run over the whole sequence again at each step. Where our kernels compute
every attention (`session.decoding_session`), P is the room for tokens to come, past and present are
the same memory, and a step copies nothing.

An input that may be left out, an initializer listed as an input: logits_to_keep, int64 scalar, 0 by
default. k above 0 gives the logits (B, min(k, S), V) of the last k positions alone. Files without
it, older ones say, give all, of which the last k are taken here.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UnsupportedModelError, UserInputError
from elsa_compile.runtime.onnx_file import ModelFile, inspect, model_kind
from elsa_compile.runtime.session import (
    decoding_session,
    provider_of,
    run_failure,
    shares_caches,
)

_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
LOGITS_TO_KEEP = "logits_to_keep"
_LEAST_ROOM = 64  # tokens
_LINE = 16  # floats of a cache line


@dataclass
class State:
    """What B sequences have seen so far.

    Attributes:
        mask: (B, T) int64, 1 = token, 0 = padding.
        ids: (B, T) int64; kept only for a model without a cache.
        cache: 2 L onnxruntime values (B, kv_heads, T, head_dim), on the session's device. Where
            past and present are one memory: arrays (B, kv_heads, room, head_dim), T of it used.
        room: that room; 0 where caches are copied.
        binding: onnxruntime's, to that memory.
    """

    mask: NDArray[np.int64]
    ids: NDArray[np.int64]
    cache: list[Any] = field(default_factory=list)
    room: int = 0
    binding: Any = None

    @property
    def length(self) -> int:
        """Tokens seen, padding included."""
        return int(self.mask.shape[1])


class Decoder:
    """A language model in onnxruntime. Holds no sequence: a `State` does, so many can be under way.

    Attributes:
        path: the model file, for messages.
        session: the onnxruntime session.
        cached: True when the model takes and returns a KV cache.
        chooses: True when the model computes only the logits that are asked for.
        vocab_size: V where the graph says it, else None.
        shares: True when past and present keys and values are the same memory.
        batch, length: the only batch size and sequence length the graph takes; None for any.
    """

    def __init__(self, opened: Any, path: str | Path) -> None:
        """Read the contract from a session.

        Raises:
            UnsupportedModelError: no language model, or an input this release cannot feed.
        """
        self.path = Path(path)
        self.session = opened
        self._inputs = {value.name: value for value in opened.get_inputs()}
        self._outputs = {value.name: value for value in opened.get_outputs()}
        kind, layers = model_kind(list(self._inputs), list(self._outputs))
        if "input_ids" not in self._inputs or "logits" not in self._outputs:
            raise UnsupportedModelError(
                f"{path} is not a language model: it takes {_some(self._inputs)} and gives "
                f"{_some(self._outputs)}, wanted input_ids in and logits out"
            )
        self.cached = kind == "decoder-with-cache"
        self._past, self._present = self._cache_names(layers)
        unknown = set(self._inputs) - set(_TOKEN_INPUTS) - set(self._past)
        if unknown:
            raise UnsupportedModelError(
                f"{path} takes the input {min(unknown)!r}, which this release cannot feed; it "
                f"knows {', '.join(_TOKEN_INPUTS)} and past_key_values.N.key / .value"
            )
        optional = {v.name: v.type for v in opened.get_overridable_initializers()}
        self.chooses = optional.get(LOGITS_TO_KEEP) == "tensor(int64)"
        self._integers = {
            name: self._dtype(name, _INTEGERS) for name in _TOKEN_INPUTS if name in self._inputs
        }
        self._cache_shapes = [self._cache_shape(name) for name in self._past]
        scores = list(self._outputs["logits"].shape)
        if len(scores) != 3 or self._outputs["logits"].type not in _FLOATS:
            raise UnsupportedModelError(
                f"{path} gives logits of shape {scores} and type {self._outputs['logits'].type}, "
                "wanted (batch, sequence, vocabulary) of float32, float16 or float64"
            )
        self._scores = _FLOATS[self._outputs["logits"].type]
        self.vocab_size: int | None = scores[2] if isinstance(scores[2], int) else None
        shape = list(self._inputs["input_ids"].shape)
        if len(shape) != 2:
            raise UnsupportedModelError(f"{path} takes input_ids of shape {shape}, wanted 2 axes")
        self.batch, self.length = (dim if isinstance(dim, int) else None for dim in shape)
        self._on_gpu = provider_of(opened) == "cuda"
        self.shares = shares_caches(opened)

    def _cache_names(self, layers: int) -> tuple[list[str], list[str]]:
        """Names of the cache inputs and of the outputs that extend them, in the same order."""
        past = [f"past_key_values.{n}.{part}" for n in range(layers) for part in ("key", "value")]
        present = [name.replace("past_key_values", "present") for name in past]
        missing = [n for n in past if n not in self._inputs]
        missing += [n for n in present if n not in self._outputs]
        if missing:
            raise UnsupportedModelError(
                f"{self.path} has a cache of {layers} layers, but no {missing[0]}; wanted "
                "past_key_values.N.key / .value in and present.N.key / .value out, N from 0"
            )
        return past, present

    def _dtype(self, name: str, known: dict[str, Any]) -> Any:
        found = self._inputs[name].type
        if found not in known:
            raise UnsupportedModelError(
                f"{self.path}: its input {name} is {found}, wanted one of {', '.join(known)}"
            )
        return known[found]

    def _cache_shape(self, name: str) -> tuple[int, int, Any]:
        """(kv_heads, head_dim, dtype) of a cache input; its length must be free."""
        shape = list(self._inputs[name].shape)
        fits = len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
        if not fits or isinstance(shape[2], int):
            raise UnsupportedModelError(
                f"{self.path}: its input {name} has shape {shape}, wanted (batch, kv_heads, past, "
                "head_dim) with numbers for kv_heads and head_dim and any past"
            )
        return shape[1], shape[3], self._dtype(name, _FLOATS)

    def start(self, batch: int = 1, room: int = 0) -> State:
        """The state of `batch` sequences before their first token.

        Args:
            batch: B.
            room: tokens there will be, where that is known: a cache grows otherwise.

        Raises:
            UnsupportedModelError: the graph is fixed to another batch size.
        """
        if self.batch not in (None, batch):
            raise UnsupportedModelError(
                f"{self.path} takes only batches of {self.batch}, wanted {batch}; "
                "export it with a dynamic batch"
            )
        nothing = np.zeros((batch, 0), dtype=np.int64)
        if self.shares:
            state = State(nothing, nothing)
            self._make_room(state, room)
            return state
        return State(nothing, nothing, [self._empty(batch, *shape) for shape in self._cache_shapes])

    def branch(self, state: State) -> State:
        """Another state that has seen the same and goes its own way."""
        if not self.shares:
            return State(state.mask, state.ids, list(state.cache))
        made = State(state.mask, state.ids, list(state.cache), room=0)
        self._make_room(made, state.room)
        return made

    def _make_room(self, state: State, tokens: int) -> None:
        """Caches with room for so many tokens, and what was seen in them."""
        if state.room >= tokens:
            return
        batch, seen = len(state.mask), state.length
        room = max(tokens, state.room + state.room // 2, _LEAST_ROOM)
        shapes = [(batch, heads, room, width) for heads, width, _ in self._cache_shapes]
        starts = np.cumsum([0] + [-(-math.prod(shape) // _LINE) * _LINE for shape in shapes])
        # One piece, for which numpy asks the system for large pages: a token reads all of it.
        memory = np.empty(int(starts[-1]) + _LINE, np.float32)
        skip = -(memory.ctypes.data // 4) % _LINE
        binding, made = self.session.io_binding(), []
        for index, shape in enumerate(shapes):
            first = skip + int(starts[index])
            new = memory[first : first + math.prod(shape)].reshape(shape)
            if seen:
                new[:, :, :seen] = state.cache[index][:, :, :seen]
            at = new.ctypes.data
            binding.bind_input(self._past[index], "cpu", 0, np.float32, shape, at)
            binding.bind_output(self._present[index], "cpu", 0, np.float32, shape, at)
            made.append(new)
        state.cache, state.room, state.binding = made, room, binding

    def _empty(self, batch: int, heads: int, width: int, dtype: Any) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, width), dtype))

    def extend(
        self, state: State, ids: NDArray[Any], mask: NDArray[Any] | None = None, keep: int = 0
    ) -> NDArray[Any]:
        """Feed S more tokens to every sequence; changes `state`.

        Args:
            state: from `start`, perhaps already extended.
            ids: (B, S) integer.
            mask: (B, S), 1 = token, 0 = padding; None for all tokens.
            keep: of how many last positions logits are wanted; 0 for all.

        Returns:
            Logits (B, S, V) of these S positions, or (B, min(keep, S), V) of the last ones, in the
            model's float type.

        Raises:
            UserInputError: a token outside of the vocabulary.
            ElsaError: onnxruntime fails.
        """
        if keep < 0:
            raise ValueError(f"keep is {keep}, wanted 0 (all positions) or more")
        ids = np.asarray(ids, dtype=np.int64)
        added = np.ones_like(ids) if mask is None else np.asarray(mask, dtype=np.int64)
        if ids.ndim != 2 or ids.shape != added.shape or len(ids) != len(state.mask):
            raise ValueError(f"ids {ids.shape}, mask {added.shape}, state {state.mask.shape}")
        # Some kernels read past the end of the embedding instead of complaining.
        if ids.size and (ids.min() < 0 or ids.max() >= (self.vocab_size or np.inf)):
            raise UserInputError(
                f"{self.path} knows tokens 0 to {(self.vocab_size or 0) - 1}, but the text gives "
                f"{ids.min()} to {ids.max()}; is this the model's own tokenizer (--tokenizer)?"
            )
        whole = np.concatenate([state.mask, added], axis=1)
        wanted = min(keep or ids.shape[1], ids.shape[1])
        if self.shares:
            logits = self._step(state, ids, whole, wanted)
        elif self.cached:
            logits, state.cache = self._run(ids, whole, state.cache, wanted)
        else:
            state.ids = np.concatenate([state.ids, ids], axis=1)
            logits, _ = self._run(state.ids, whole, [], wanted)
        state.mask = whole
        return logits[:, logits.shape[1] - wanted :]

    def _run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: list[Any], wanted: int
    ) -> tuple[NDArray[Any], list[Any]]:
        """One run; mask covers past and new tokens. The cache stays on the session's device.

        Logits are those of the `wanted` last positions where the model can choose, else of all.
        """
        feeds = self._feeds(ids, mask)
        try:
            binding = self.session.io_binding()
            for name, values in feeds.items():
                binding.bind_cpu_input(name, values)
            number = _scalar(wanted)  # older versions of onnxruntime keep no reference to it
            if self.chooses and wanted < ids.shape[1]:
                binding.bind_ortvalue_input(LOGITS_TO_KEEP, number)
            for name, value in zip(self._past, cache, strict=True):
                binding.bind_ortvalue_input(name, value)
            binding.bind_output("logits", "cpu")
            for name in self._present:
                binding.bind_output(name, "cuda" if self._on_gpu else "cpu")
            self.session.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
            return logits.numpy(), present
        except Exception as error:
            raise run_failure(error, self.path) from None

    def _feeds(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The token inputs; mask covers past and new tokens."""
        if self.length not in (None, ids.shape[1]):
            raise UnsupportedModelError(
                f"{self.path} takes only sequences of {self.length} tokens, wanted {ids.shape[1]}; "
                "export it with a dynamic length"
            )
        if "attention_mask" not in self._inputs and not mask.all():
            raise UnsupportedModelError(f"{self.path} takes no attention_mask, so no padded batch")
        # Padding takes no position: the first real token of a left-padded row is at 0.
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {
            name: np.ascontiguousarray(feeds[name], dtype=dtype)
            for name, dtype in self._integers.items()
        }

    def _step(
        self, state: State, ids: NDArray[np.int64], mask: NDArray[np.int64], wanted: int
    ) -> NDArray[Any]:
        """One run whose keys and values go where those of the past are. Logits as in `_run`."""
        feeds = self._feeds(ids, mask)
        self._make_room(state, mask.shape[1])
        try:
            binding = state.binding
            for name, values in feeds.items():
                binding.bind_cpu_input(name, values)
            kept = wanted if self.chooses else ids.shape[1]
            number = _scalar(0 if kept == ids.shape[1] else kept)  # as long as the run needs it
            if self.chooses:
                binding.bind_ortvalue_input(LOGITS_TO_KEEP, number)
            if self.vocab_size is None:
                binding.bind_output("logits", "cpu")
                self.session.run_with_iobinding(binding)
                found: NDArray[Any] = binding.get_outputs()[-1].numpy()
                return found
            # Asked for its outputs the binding would wrap every cache anew.
            logits = np.empty((len(ids), kept, self.vocab_size), self._scores)
            at = logits.ctypes.data
            binding.bind_output("logits", "cpu", 0, self._scores, logits.shape, at)
            self.session.run_with_iobinding(binding)
            return logits
        except Exception as error:
            raise run_failure(error, self.path) from None


def open_decoder(
    path: str | Path,
    threads: int | None = None,
    provider: str = "auto",
    config: dict[str, str] | None = None,
) -> tuple[Decoder, ModelFile]:
    """Check, open and wrap a language model.

    Raises:
        UserInputError: as `session`.
        UnsupportedModelError: not a language model of the contract above.
    """
    model = inspect(path)
    opened = decoding_session(model.path, threads, provider, checked=model, config=config)
    return Decoder(opened, model.path), model


def _scalar(number: int) -> Any:
    """An int64 scalar. onnxruntime's bind_cpu_input does not know inputs with a default."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.array(number, dtype=np.int64))


def _some(names: Any) -> str:
    """The first names of many, safe to print."""
    safe = [re.sub(r"[^\x20-\x7e]", "?", name)[:40] for name in list(names)[:4]]
    return ", ".join(safe) + (", ..." if len(names) > 4 else "") if safe else "nothing"
