"""train_bridges(): the maps between two trained models; or a sparse model from scratch, and its bridge with it.

Per step, with h the streams of both models on one batch, and i running over the tied pairs:

    NMSE      encode(h_dense_i) to h_sparse_i, which stays as it is, and decode(h_sparse_i) to h_dense_i, at every pair
    KL        of the dense model to each model entered from the other's stream at i, at a few pairs in turn
    change    of the sparse model as channels of h_sparse_i are exchanged between blocks: the share that the dense one's
              is not if it is carried over (`bridges/interchange.py`), at the same pairs
    CE, KL    of the sparse model to the text and to the dense model, where the sparse model is trained too

Gao et al. 2025 (arXiv 2511.13653), but for the changes; every loss is per token. A pass entered at i costs what lies
behind i, so all pairs cost as the square of the depth. A step enters at `entries_per_step` of them, dealt like cards,
and counts each n_pairs / entries_per_step times: the expected gradient is that of all. The dense model is never
trained. Gradients of the bridge and of the sparse model that is trained with it are each divided by their own root mean
square. Training begins from the ridge regressions between the streams of some of the text, and between models that stay
as they are the maps take their steps in the coordinates of `bridges/coordinates.py`, with gradients as they are there.

Where AbsTopK acts, a KL jumps as two channels change places, and its gradient knows nothing of the jump: it pushes the
maps of the tokens concerned somewhere, however close they are to what is exact, and more tokens change places as they
move. (Between twins a start that is exact to 1e-13 is left at the first tie, and an NMSE of 1e-3 is where that ends.)
So what comes out between models that stay as they are is the best that was measured on held-out blocks, the start
among them.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sparse_interp.axes import Logits, Tokens
from sparse_interp.bridges.bridge import Bridge, End, nmse
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.coordinates import Coordinates
from sparse_interp.bridges.hybrid import DENSE, SPARSE, streams_and_logits
from sparse_interp.bridges.interchange import Interchange
from sparse_interp.bridges.stretches import decoded
from sparse_interp.errors import BridgeError, CheckpointError
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.training.checkpoints import (
    CHECKPOINT,
    METRICS,
    RUN,
    check_writable,
    load_optimizer_,
    on_disk,
    optimizer_tensors,
    read_checkpoint,
    refuse_occupied,
    replace_file,
    rewind_metrics,
    warn_of_threads,
    write_checkpoint,
    writing,
)
from sparse_interp.training.loop import MODEL, NonFiniteLossError
from sparse_interp.training.optimizer import (
    advance_,
    gradient_rms,
    lr_schedule,
    make_optimizer,
    normalise_gradients_,
    optimizer_of,
)
from sparse_interp.training.recipes import RunConfig

BRIDGE = "bridge"
Blocks = Int[Tensor, "block pos"]
HeldOut = Int[Tensor, "held_out held_out_pos"]
Loss = Float[Tensor, ""]

PAIR_LOSSES = ("encode", "decode", "enter_sparse", "enter_dense", "interchange")
"""Losses that every pair of sites has; their coefficients end in `_coef`."""

FIT_TOKENS = 1 << 14
"""Tokens of text between whose streams the least squares are taken."""


class BridgeRecord(NamedTuple):
    """What one optimizer step did."""

    step: int
    """Steps done so far, this one included."""

    loss: float
    """Everything that the step minimised, with its coefficients."""

    encode: dict[str, float]
    """NMSE of encoded dense streams, by pair."""

    decode: dict[str, float]
    """NMSE of decoded sparse streams, by pair."""

    enter_sparse: dict[str, float]
    """KL(dense || sparse entered), nats per token, at the pairs that this step entered at."""

    enter_dense: dict[str, float]
    """KL(dense || dense entered), nats per token, at the same pairs."""

    interchange: dict[str, float]
    """Share of the sparse model's change that is not carried, at the same pairs."""

    next_token: float | None
    """The sparse model's loss on the batch, nats per token; None where it is not trained."""

    distillation: float | None
    """KL(dense || sparse), nats per token; None where the sparse model is not trained."""

    lr: float
    """Learning rate of the bridge."""

    grad_rms: float
    """Root mean square of the bridge's gradient before it was divided by it."""

    sparse_lr: float | None
    """Learning rate of the sparse model; None where it is not trained."""

    sparse_grad_rms: float | None
    """Root mean square of the sparse model's gradient."""

    density: float | None
    """Share of its weights allowed to be non-zero after the step."""

    tokens: int
    """Tokens seen so far."""

    validation: dict[str, Any] | None
    """The same losses at every pair on held-out blocks; None between measurements."""


class Best(NamedTuple):
    """The maps of the lowest loss on held-out blocks so far."""

    step: int
    """Steps after which they were measured; 0 is the start."""

    loss: float
    """Everything that is minimised, on the held-out blocks."""

    maps: dict[str, Tensor]
    """State of the bridge then."""


class Deck:
    """The numbers below `n` in random order, all of them before any comes again, however many are drawn at once."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.generator = n, generator
        self.rest = torch.zeros(0, dtype=torch.long)

    def draw(self, k: int) -> Int[Tensor, " drawn"]:
        """The next `k`; none of them twice unless k > n."""
        drawn, self.rest = self.rest[:k], self.rest[k:]
        while len(drawn) < k:
            fresh = torch.randperm(self.n, generator=self.generator)
            again = torch.isin(fresh, drawn)
            fresh = torch.cat([fresh[~again], fresh[again]])
            taken, self.rest = fresh[: k - len(drawn)], fresh[k - len(drawn) :]
            drawn = torch.cat([drawn, taken])
        return drawn

    def state(self) -> dict[str, Tensor]:
        """Everything that the next draw depends on."""
        return {"rest": self.rest.clone(), "generator": self.generator.get_state()}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to where `state` was taken."""
        self.rest = state["rest"].clone()
        self.generator.set_state(state["generator"])


@dataclass
class Losses:
    """What one batch costs."""

    by_pair: dict[str, dict[SitePair, Loss]]
    """For each of `PAIR_LOSSES`, the loss at every pair where it was taken."""

    alone: dict[str, Loss]
    """`next_token` and `distillation`, where the sparse model is trained."""

    def total(self, config: BridgeConfig, n_pairs: int) -> Loss:
        """Their sum, with coefficients; a loss taken at some pairs stands for all."""
        sums = [
            getattr(config, f"{name}_coef") * n_pairs / len(found) * torch.stack(list(found.values())).sum()
            for name, found in self.by_pair.items()
            if found
        ]
        return torch.stack([*sums, *(getattr(config, f"{k}_coef") * loss for k, loss in self.alone.items())]).sum()

    def numbers(self) -> dict[str, Any]:
        """The same as plain numbers."""
        named = {name: {str(pair): loss for pair, loss in found.items()} for name, found in self.by_pair.items()}
        flat = [*(loss for found in named.values() for loss in found.values()), *self.alone.values()]
        values = iter(torch.stack([loss.detach().float() for loss in flat]).tolist())
        said: dict[str, Any] = {name: {pair: next(values) for pair in found} for name, found in named.items()}
        return said | {name: next(values) for name in self.alone}


class BridgeTrainer:
    """A bridge, its optimizer and its place in the text; and the sparse model's, where that is trained too."""

    def __init__(
        self,
        sparse: AnyModel,
        dense: AnyModel,
        blocks: Blocks,
        config: BridgeConfig,
        *,
        run: RunConfig | None = None,
        validation: HeldOut | None = None,
    ):
        self.sparse, self.dense = hooked(sparse), hooked(dense)
        self.blocks, self.validation, self.config = blocks, validation, config
        self.bridge = Bridge.between(self.sparse, self.dense, config)
        self.began_with = (self.bridge.sparse, self.bridge.dense)
        _check_blocks(self.sparse, self.dense, blocks, validation)
        self.run = None if run is None else _fitted_run(run, self.sparse, blocks, config)
        self.optimizer = make_optimizer(self.bridge, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)
        self.sparse_optimizer = None
        if self.run is not None:
            assert isinstance(self.sparse, HookedSparseTransformer)
            self.sparse_optimizer = optimizer_of(self.sparse, self.run)
        self.decks = {
            name: Deck(n, torch.Generator().manual_seed(config.seed + i))
            for i, (name, n) in enumerate({"blocks": len(blocks), "pairs": len(self.bridge.pairs)}.items())
        }
        self.drawing = torch.Generator().manual_seed(config.seed + len(self.decks))
        """Draws what is exchanged."""
        self.coordinates: dict[SitePair, tuple[Coordinates, Coordinates]] = {}
        """Those in which encoders and decoders take their steps; none while the streams themselves are trained."""
        self.best: Best | None = None
        """What is going to come out; None while the streams are trained too, or without held-out blocks."""
        self.began_at: dict[str, Any] = {}
        """Losses of the start on the held-out blocks."""
        self.step_done = 0
        self.seconds = 0.0
        """Time spent in steps and measurements so far, interruptions not counted."""
        self.sound = True
        """Whether the weights are those after `step_done` steps, and not halfway to the next."""
        self.recorded = 0
        """The last step of which there is a record."""
        self._before = self._places()

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> BridgeRecord:
        """One optimizer step on the next batch.

        Raises:
            NonFiniteLossError: if the loss or a gradient is not finite; weights are left as they were.
        """
        began, config = time.monotonic(), self.config
        self._before = self._places()
        tokens = self.blocks[self.decks["blocks"].draw(config.batch_size)].long().to(self._device)
        n_pairs = len(self.bridge.pairs)
        drawn = self.decks["pairs"].draw(min(n_pairs, config.entries_per_step or n_pairs)).tolist()
        with self._working():
            if self.step_done == 0:
                self._fit()
                self.began_at = self._measured() or {}
            with torch.autocast(tokens.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
                losses = self._losses(tokens, [self.bridge.pairs[i] for i in sorted(drawn)], self.drawing)
            loss = losses.total(config, n_pairs)
            value = loss.item()
            if not math.isfinite(value):
                raise self._non_finite(f"the loss is {value}")
            for optimizer in self._optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
        grads = self._scaled()
        if not all(map(math.isfinite, grads.values())):
            raise self._non_finite(f"the loss is {value:.4g} and its gradients {grads}")
        lr, sparse_lr, density = self._advance()
        said = {"next_token": None, "distillation": None} | losses.numbers()
        measured = self.step_done % config.validate_every == 0 or self.step_done == config.n_steps
        record = BridgeRecord(
            step=self.step_done,
            loss=value,
            lr=lr,
            grad_rms=grads[BRIDGE],
            sparse_lr=sparse_lr,
            sparse_grad_rms=grads.get(SPARSE),
            density=density,
            tokens=self.step_done * tokens.numel(),
            validation=self._measured() if measured else None,
            **said,
        )
        self.seconds += time.monotonic() - began
        return record

    def _advance(self) -> tuple[float, float | None, float | None]:
        """Move the weights along their gradients: both learning rates, and the density after it."""
        self.sound, config = False, self.config
        lr = config.lr * lr_schedule(self.step_done, n_steps=config.n_steps, warmup_frac=config.warmup_frac)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = {name: p.detach().clone() for name, p in self.bridge.named_parameters()}
        self.optimizer.step()
        for coordinates, names in self._turned():
            weight, bias = (self.bridge.get_parameter(name) for name in names)
            coordinates.turn_step_(weight, bias, (before[names[0]], before[names[1]]))
        sparse_lr = density = None
        if self.run is not None and self.sparse_optimizer is not None:
            assert isinstance(self.sparse, HookedSparseTransformer)
            sparse_lr, density = advance_(self.sparse, self.sparse_optimizer, self.run, self.step_done)
        self.step_done += 1
        self._before, self.sound = self._places(), True
        return lr, sparse_lr, density

    @torch.no_grad()
    def _scaled(self) -> dict[str, float]:
        """Bring gradients to the scale that an optimizer takes them at; their sizes, for the record."""
        if self.run is not None:
            return {name: normalise_gradients_(module) for name, module in self._trained.items()}
        for coordinates, names in self._turned():
            coordinates.turn_gradient_(*(self.bridge.get_parameter(name) for name in names))
        for pair in self.bridge.pairs:
            theta = self.bridge[pair].log_theta
            if theta is not None and theta.grad is not None:
                theta.grad.mul_(len(theta) / 2)
        return {BRIDGE: gradient_rms(self.bridge)}

    def _turned(self) -> Iterator[tuple[Coordinates, tuple[str, str]]]:
        """The maps that take their steps in coordinates of their own: these, and the names of weight and bias."""
        for pair, (encoding, decoding) in self.coordinates.items():
            yield encoding, (f"maps.{pair}.W_encode", f"maps.{pair}.b_encode")
            yield decoding, (f"maps.{pair}.W_decode", f"maps.{pair}.b_decode")

    def _losses(self, tokens: Tokens, entered: list[SitePair], generator: torch.Generator) -> Losses:
        """Every loss on a batch; hybrid passes and changes enter at the pairs `entered`."""
        config, pairs = self.config, self.bridge.pairs
        with torch.no_grad():
            dense, teacher = streams_and_logits(self.dense, tokens, [pair.dense for pair in pairs])
            wide = torch.promote_types(teacher.dtype, torch.float32)
            target = _Teacher(teacher.to(wide))
        with nullcontext() if self.run is not None else torch.no_grad():
            sparse, student = streams_and_logits(self.sparse, tokens, [pair.sparse for pair in pairs])
        exchanged = Interchange.draw(len(tokens), self.bridge.sparse.d_model, generator=generator)
        by_pair: dict[str, dict[SitePair, Loss]] = {name: {} for name in PAIR_LOSSES}
        for pair in pairs:
            here, there = sparse[pair.sparse], dense[pair.dense]
            encoded, decoded = self.bridge.encode(there, pair), self.bridge.decode(here, pair)
            by_pair["encode"][pair] = nmse(encoded, here.detach())
            by_pair["decode"][pair] = nmse(decoded, there)
            if pair not in entered:
                continue
            ways = {SPARSE: (self.sparse, pair.sparse, encoded), DENSE: (self.dense, pair.dense, decoded)}
            for kind, (model, site, stream) in ways.items():
                if getattr(config, f"enter_{kind}_coef") > 0:
                    stream = stream.to(model.embed.W_E.dtype)
                    by_pair[f"enter_{kind}"][pair] = target.kl(model.between(tokens, enter=(site, stream)))
            if config.interchange_coef > 0:
                held = {SPARSE: (here.detach(), student.detach()), DENSE: (there, teacher)}
                by_pair["interchange"][pair] = self._not_carried(tokens, pair, held, exchanged)
        if self.run is None:
            return Losses(by_pair, {})
        assert isinstance(self.sparse, HookedSparseTransformer)
        alone = {"next_token": self.sparse.loss_fn(student, tokens), "distillation": target.kl(student)}
        return Losses(by_pair, alone)

    def _not_carried(
        self, tokens: Tokens, pair: SitePair, held: Mapping[str, tuple[Tensor, Logits]], exchanged: Interchange
    ) -> Loss:
        """What is not carried of a change at one pair; `held` are either model's stream there, and its logits."""
        (ours, student), (theirs, teacher) = held[SPARSE], held[DENSE]
        change = exchanged.change(ours)
        with torch.no_grad():
            changed = self.sparse.between(tokens, enter=(pair.sparse, ours + change))
        moved = theirs + decoded(self.bridge, change, pair).to(theirs)
        carried = self.dense.between(tokens, enter=(pair.dense, moved))
        probs = teacher.to(torch.promote_types(teacher.dtype, torch.float32)).softmax(-1)
        return exchanged.not_carried(changed - student, carried - teacher, probs)

    @torch.no_grad()
    def _fit(self) -> None:
        """Begin with the least squares between the streams of some of the text, taken at even distances."""
        n_blocks = min(len(self.blocks), max(1, FIT_TOKENS // self.blocks.shape[1]))
        chosen = self.blocks[:: len(self.blocks) // n_blocks][:n_blocks].long()
        sites = {SPARSE: [pair.sparse for pair in self.bridge.pairs], DENSE: [pair.dense for pair in self.bridge.pairs]}
        found: dict[tuple[str, int], list[Tensor]] = {(kind, site): [] for kind in sites for site in sites[kind]}
        for tokens in chosen.split(self.config.batch_size):
            for kind, model in ((SPARSE, self.sparse), (DENSE, self.dense)):
                streams, _ = streams_and_logits(model, tokens.to(self._device), sites[kind])
                for site, stream in streams.items():
                    found[kind, site].append(stream)
        for pair in self.bridge.pairs:
            ours, theirs = torch.cat(found[SPARSE, pair.sparse]), torch.cat(found[DENSE, pair.dense])
            self.bridge.fit_(pair, ours, theirs)
            if self.run is None:
                self.coordinates[pair] = Coordinates.of(theirs, ours), Coordinates.of(ours, theirs)

    @torch.no_grad()
    def measure(self, batch_size: int = 16) -> dict[str, Any] | None:
        """Every loss at every pair on the held-out blocks, as analysis sees the models; None without such blocks."""
        if self.validation is None:
            return None
        sums: dict[str, Any] = {}
        drawing = torch.Generator().manual_seed(self.config.seed)  # what is exchanged is the same every time
        with evaluating(self.sparse), evaluating(self.dense):
            for part in self.validation.tensor_split(math.ceil(len(self.validation) / batch_size)):
                losses = self._losses(part.long().to(self._device), list(self.bridge.pairs), drawing)
                share = len(part) / len(self.validation)
                _add(sums, losses.numbers(), share)
        return sums

    def _measured(self) -> dict[str, Any] | None:
        """`measure`, and the best so far is kept."""
        found = self.measure()
        if found is None or self.run is not None:
            return found
        loss = sum(getattr(self.config, f"{name}_coef") * sum(found[name].values()) for name in PAIR_LOSSES)
        if self.best is None or loss < self.best.loss:
            self.best = Best(self.step_done, loss, {k: t.clone() for k, t in self.bridge.state_dict().items()})
        return found

    # -- the models while they are at work ----------------------------------------------------------------------------

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Inside the block what is not trained has no gradients, and models of ours run on their fused kernels."""
        with ExitStack() as stack:
            for model, trained in ((self.sparse, self.run is not None), (self.dense, False)):
                stack.callback(model.train, model.training)
                model.train() if isinstance(model, HookedSparseTransformer) else model.eval()
                for p in [] if trained else model.parameters():
                    stack.callback(p.requires_grad_, p.requires_grad)
                    p.requires_grad_(False)
            yield

    @property
    def _device(self) -> torch.device:
        return self.sparse.embed.W_E.device

    @property
    def _trained(self) -> dict[str, Any]:
        return {BRIDGE: self.bridge} | ({} if self.run is None else {SPARSE: self.sparse})

    @property
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {BRIDGE: self.optimizer} | ({} if self.sparse_optimizer is None else {SPARSE: self.sparse_optimizer})

    def _non_finite(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what} at step {self.step_done + 1} of {self.config.n_steps}. The last checkpoint, if any, is sound: "
            f"train again with a lower lr (now {self.config.lr}), or resume from it."
        )

    def _places(self) -> dict[str, dict[str, Tensor]]:
        drawing = {"interchange": {"generator": self.drawing.get_state()}}
        return {name: deck.state() for name, deck in self.decks.items()} | drawing

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What is trained, by what, on what: a checkpoint belongs to nothing else."""
        sparse, dense = (vars(end) for end in self.began_with)
        if self.run is not None:  # its weights change; what it began with is in the checkpoint
            sparse = sparse | {"weights_sha256": "trained"}
        return {
            "config": self.config.to_dict(),
            "run": None if self.run is None else json.loads(self.run.to_json()),
            "sparse": sparse,
            "dense": dense,
            "blocks": _sha256(self.blocks),
            "validation": None if self.validation is None else _sha256(self.validation),
        }

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in `folder`, once the new one is whole."""
        tensors = {f"rng.{name}.{key}": t for name, state in self._before.items() for key, t in state.items()}
        for name, module in self._trained.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
            tensors |= optimizer_tensors(self._optimizers[name], module, f"{name}-optimizer")
        for pair, ways in self.coordinates.items():
            for way, coordinates in zip(("encode", "decode"), ways, strict=True):
                tensors |= {f"coordinates.{pair}.{way}.{key}": t for key, t in vars(coordinates).items()}
        if self.best is not None:
            tensors |= {f"best.{key}": tensor for key, tensor in self.best.maps.items()}
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
            raise self._non_finite("the weights are no longer finite")
        metadata = {"step": str(self.step_done), "run": json.dumps(self.describe()), "seconds": repr(self.seconds)}
        metadata |= {"began_at": json.dumps(self.began_at), "best": json.dumps(self.best and self.best[:2])}
        write_checkpoint(folder, tensors, metadata)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`.

        Raises:
            CheckpointError: if there is none, it is damaged, or it belongs to other models, text or settings.
        """
        path = folder / CHECKPOINT
        tensors, metadata = read_checkpoint(path)
        refuse_another(path, json.loads(metadata["run"]), self.describe())
        try:
            for name, module in self._trained.items():
                module.load_state_dict(_below(tensors, name))
                load_optimizer_(self._optimizers[name], module, tensors, f"{name}-optimizer")
            for name, deck in self.decks.items():
                deck.set_state(_below(tensors, f"rng.{name}"))
            self.drawing.set_state(tensors["rng.interchange.generator"])
            if self.run is None and int(metadata["step"]) > 0:
                held = _below(tensors, "coordinates")
                for pair in self.bridge.pairs:
                    ways = (_below(held, f"{pair}.{way}") for way in ("encode", "decode"))
                    encoding, decoding = ({key: t.to(self._device) for key, t in way.items()} for way in ways)
                    self.coordinates[pair] = Coordinates(**encoding), Coordinates(**decoding)
            self.step_done, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            self.began_at, best = json.loads(metadata["began_at"]), json.loads(metadata["best"])
            maps = {key: t.to(self._device) for key, t in _below(tensors, "best").items()}
            self.best = None if best is None else Best(*best, maps)
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path} is incomplete ({error}); delete it and train again.") from error
        self.recorded = self.step_done
        self._before = self._places()
        warn_of_threads(metadata)

    def finish(self, folder: Path | None) -> None:
        """Take the best maps and save what was trained to `folder`, unless a run that was interrupted after has."""
        if self.run is not None:
            self.bridge.sparse = End.of(self.sparse)  # its weights are no longer those that it began with
        if self.best is not None:
            self.bridge.load_state_dict(self.best.maps)
        if folder is None:
            return
        if self.run is not None and not (folder / MODEL).exists():
            assert isinstance(self.sparse, HookedSparseTransformer)
            self.sparse.save(folder / MODEL)
        if not (folder / BRIDGE).exists():
            self.bridge.save(folder / BRIDGE, card=self.card())

    def card(self) -> dict[str, Any]:
        """How the bridge was trained and how well it fits, for readers."""
        measured = self.measure() or {}
        n_blocks = 0 if self.validation is None else len(self.validation)
        return {
            "name": f"{self.bridge.sparse.name} - {self.bridge.dense.name}",
            "n_parameters": sum(p.numel() for p in self.bridge.parameters()),
            "n_tokens": self.step_done * self.config.batch_size * self.blocks.shape[1],
            "minutes": round(self.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "sparse_model": vars(self.bridge.sparse),
            "dense_model": vars(self.bridge.dense),
            "training": {**self.config.to_dict(), "sparse_model_trained_too": self.run is not None},
            "held_out": {"n_blocks": n_blocks, "chosen_step": None if self.best is None else self.best.step},
            "held_out_by_pair": self._by_pair(measured),
            "held_out_by_pair_at_the_start": self._by_pair(self.began_at),
        }

    def _by_pair(self, measured: dict[str, Any]) -> dict[str, dict[str, float]]:
        names = [name for name in PAIR_LOSSES if measured.get(name)]
        return {str(pair): {name: measured[name][str(pair)] for name in names} for pair in self.bridge.pairs if names}


def train_bridges(
    sparse: AnyModel,
    dense: AnyModel,
    blocks: Blocks,
    config: BridgeConfig | None = None,
    *,
    run: RunConfig | None = None,
    validation: HeldOut | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Bridge:
    """Train a bridge between two models, which stay as they are; or, with `run`, the sparse model with it, in place.

    Args:
        sparse: the sparse model; with `run` one of ours with initial weights.
        dense: the dense model, ours or one of TransformerLens; it is never trained.
        blocks: text, as tokens of both models.
        config: sites, maps, losses and training; None takes the defaults.
        run: how the sparse model is trained from scratch: optimizer, density and its schedule, as `si.train` has them.
            Its number of steps, batch size and precision are those of `config`.
        validation: held-out blocks, to be measured on every `config.validate_every` steps. Between models that stay as
            they are, the bridge that measures best is returned, be it the start; without such blocks, the last.
        folder: where run.json, metrics.jsonl (a record per step), checkpoint.safetensors and at the end `bridge` (and
            `model`) go. Interrupt at any moment; with `resume` the weights that come out are, on the CPU and with as
            many threads, those of the run that was never interrupted, bit for bit. None keeps nothing.
        resume: continue what `folder` holds.
        progress: whether to show a progress bar.

    Raises:
        BridgeError: before any work, for models that cannot be tied, or text that they cannot read.
        CheckpointError: if `folder` cannot be written, holds another run, or (with `resume`) holds none.
        NonFiniteLossError: if the loss stops being a number; the last good checkpoint stays.
    """
    settings = {"run": run, "validation": validation, "folder": folder, "resume": resume, "progress": progress}
    steps = bridge_steps(sparse, dense, blocks, config, **settings)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def bridge_steps(
    sparse: AnyModel,
    dense: AnyModel,
    blocks: Blocks,
    config: BridgeConfig | None = None,
    *,
    run: RunConfig | None = None,
    validation: HeldOut | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Iterator[BridgeRecord]:
    """`train_bridges` as a generator of its records; whoever stops asking leaves a checkpoint of the last step."""
    config = config or BridgeConfig()
    trainer = BridgeTrainer(sparse, dense, blocks, config, run=run, validation=validation)
    out = None if folder is None else Path(folder)
    if out is not None:
        _claim(out, trainer, resume=resume)
    elif resume:
        raise CheckpointError("resume=True continues what a folder holds; name the folder.")
    bar = tqdm(
        total=config.n_steps, initial=trainer.step_done, disable=not progress, unit="step", desc="bridge", mininterval=1
    )
    with bar, ExitStack() as stack:
        metrics = None
        if out is not None:
            stack.enter_context(writing(out))
            metrics = stack.enter_context((out / METRICS).open("a", encoding="utf-8"))
        try:
            yield from _advancing(trainer, out, metrics, bar)
        except (GeneratorExit, KeyboardInterrupt):
            if out is not None and metrics is not None and trainer.sound and trainer.recorded == trainer.step_done:
                _checkpoint(trainer, metrics, out)
            raise
    return trainer.bridge


def _advancing(trainer: BridgeTrainer, out: Path | None, metrics: TextIO | None, bar: tqdm) -> Iterator[BridgeRecord]:
    config = trainer.config
    if trainer.step_done == config.n_steps:
        trainer.finish(out)
    while trainer.step_done < config.n_steps:
        record = trainer.step()
        if out is not None and metrics is not None:
            metrics.write(json.dumps(record._asdict()) + "\n")
            trainer.recorded = record.step
            if record.step % config.checkpoint_every == 0 or record.step == config.n_steps:
                _checkpoint(trainer, metrics, out)
        means = [sum(found.values()) / len(found) for found in (record.encode, record.decode)]
        bar.set_postfix_str(f"NMSE {means[0]:.3f} encoded, {means[1]:.3f} decoded", False)
        bar.update()
        if record.step == config.n_steps:
            trainer.finish(out)
        yield record


class _Teacher:
    """What the dense model says on a batch, ready for one KL after the other."""

    def __init__(self, logits: Logits):
        log_probs = logits.log_softmax(-1).flatten(0, 1)
        self.probs = log_probs.exp()
        self.entropy = -(self.probs * log_probs).sum(-1).mean()

    def kl(self, logits: Logits) -> Loss:
        """KL(teacher || logits), nats per token."""
        return nn.functional.cross_entropy(logits.to(self.probs.dtype).flatten(0, 1), self.probs) - self.entropy


def _add(sums: dict[str, Any], numbers: dict[str, Any], share: float) -> None:
    """Add a share of `numbers` to the sums under the same names."""
    for name, number in numbers.items():
        if isinstance(number, dict):
            _add(sums.setdefault(name, {}), number, share)
        else:
            sums[name] = sums.get(name, 0.0) + share * number


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


# -- refusals, and the folder of a run --------------------------------------------------------------------------------


def _check_blocks(sparse: HookedModel, dense: HookedModel, blocks: Blocks, validation: HeldOut | None) -> None:
    """Raise BridgeError unless both models can read the text."""
    n_ctx, d_vocab = min(sparse.cfg.n_ctx, dense.cfg.n_ctx), sparse.cfg.d_vocab
    for name, text in (("blocks", blocks), ("validation", validation)):
        if text is None:
            continue
        if len(text) == 0 or not 2 <= text.shape[1] <= n_ctx:
            raise BridgeError(
                f"{name} has shape {list(text.shape)}; blocks of 2 to {n_ctx} tokens are needed, which is what both "
                "models can read."
            )
        least, most = int(text.min()), int(text.max())
        if not 0 <= least <= most < d_vocab:
            raise BridgeError(f"{name} has token ids {least} to {most}; the models know 0 to {d_vocab - 1}.")


def _fitted_run(run: RunConfig, sparse: HookedModel, blocks: Blocks, config: BridgeConfig) -> RunConfig:
    """The run of a sparse model as long as the bridge's, in batches of the same text.

    Raises:
        BridgeError: if it is not the run of this model.
    """
    if not isinstance(sparse, HookedSparseTransformer):
        raise BridgeError(f"run= trains a HookedSparseTransformer with its bridge; got {sparse.cfg.model_name!r}.")
    asked, there = (json.loads(cfg.to_json()) for cfg in (run.model, sparse.cfg))
    differing = [f"{key}: {value}, not {there.get(key)}" for key, value in asked.items() if there.get(key) != value]
    if differing:
        raise BridgeError(
            f"run {run.name!r} is of another model than {sparse.cfg.model_name!r}: {'; '.join(differing[:6])}. "
            "Pass HookedSparseTransformer(run.model, tokenizer)."
        )
    n_tokens = config.n_steps * config.batch_size * run.model.n_ctx
    return replace(run, n_tokens=n_tokens, batch_size=config.batch_size, precision=config.precision)


def stored_config(out: Path) -> BridgeConfig:
    """How the run in `out` is trained.

    Raises:
        CheckpointError: if there is none.
    """
    path = out / RUN
    if not path.is_file():
        raise CheckpointError(f"{out} holds no run to resume: {RUN} is missing. Train without resume first.")
    try:
        return BridgeConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not say how a bridge is trained ({error}).") from error


def refuse_another(path: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError unless what is being trained is what `path` says."""
    flat = [_flat(described) for described in (stored, now)]
    differing = [
        f"{k}: {flat[0].get(k)}, not {flat[1].get(k)}" for k in flat[0] | flat[1] if flat[0].get(k) != flat[1].get(k)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differing[:6])}. Resume with the models, text and settings "
            "that the run began with, or choose another folder."
        )


def _flat(data: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for key, value in data.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found


def _claim(out: Path, trainer: BridgeTrainer, *, resume: bool) -> None:
    """Make `out` the folder of the run, or continue what it holds."""
    check_writable(out)
    if not resume:
        refuse_occupied(out, (CHECKPOINT, METRICS, BRIDGE, MODEL))
        replace_file(out / RUN, json.dumps(trainer.describe(), indent=1).encode())
    else:
        stored_config(out)
        refuse_another(out / RUN, json.loads((out / RUN).read_text(encoding="utf-8")), trainer.describe())
        if (out / CHECKPOINT).exists():
            trainer.load(out)
    rewind_metrics(out, trainer.step_done)


def _checkpoint(trainer: BridgeTrainer, metrics: TextIO, out: Path) -> None:
    """The records first: a checkpoint never knows of a step that they do not."""
    on_disk(metrics)
    trainer.save(out)


def _sha256(blocks: Int[Tensor, "*axes"]) -> str:
    return hashlib.sha256(blocks.long().contiguous().numpy().tobytes()).hexdigest()
