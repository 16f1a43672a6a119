"""What tests share: a seeded generator, one thread, and no state that outlives a test."""

import functools
import importlib.util
import inspect
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ForwardRef, ParamSpec, TypeVar, get_args

import jaxtyping
import pytest
import torch

LOOPBACK = ("127.0.0.1", "::1", "localhost")

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn into memory, whatever screen there is
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # read when huggingface_hub is imported; nobody listens there


# -- annotations are assertions ----------------------------------------------------------------------------------------

in_full, one_call = jaxtyping.jaxtyped, jaxtyping.jaxtyped("context")


def checked(*given, typechecker=None):
    """What jaxtyping's import hook puts around every function, at half the price: a call checks its arguments once.

    jaxtyping binds them, checks them before the call and again after it, and does so where no shape is annotated too.
    Its words about what went wrong are better; the checks are the same.
    """
    if not given:
        return functools.partial(checked, typechecker=typechecker)
    (fn,) = given
    if not inspect.isfunction(fn) or any(isinstance(hint, str) for hint in fn.__annotations__.values()):
        return in_full(fn, typechecker=typechecker)
    if not any(map(has_shape, fn.__annotations__.values())):
        return typechecker(fn)
    if inspect.isgeneratorfunction(fn):
        return in_full(fn, typechecker=typechecker)
    checking = typechecker(fn)

    @functools.wraps(fn)
    def in_a_call_of_its_own(*args, **kwargs):
        __tracebackhide__ = True
        with one_call:  # the sizes that names of axes stand for are forgotten when it ends
            return checking(*args, **kwargs)

    return in_a_call_of_its_own


def has_shape(hint) -> bool:
    """Whether an annotation speaks of shapes, or of what is known only later."""
    if isinstance(hint, list | tuple):
        return any(map(has_shape, hint))
    shape = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return shape or isinstance(hint, TypeVar | ParamSpec | ForwardRef) or any(map(has_shape, get_args(hint)))


jaxtyping.jaxtyped = checked


@pytest.fixture
def generator() -> torch.Generator:
    """The only source of randomness that a test has."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors here are tiny: a second thread only waits, and on a busy machine others wait for it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def this_machine_alone(tmp_path_factory):
    """A test that reaches for another machine fails, and none finds what its user has in the cache."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connect_here(sock, address):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            pytest.fail(f"a test reached for {address}")  # an error that no library catches and tries again
        return connect(sock, address)

    def resolve_here(host, *rest, **options):
        if host not in LOOPBACK:
            pytest.fail(f"a test asked for the address of {host!r}")
        return resolve(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setattr(socket, "getaddrinfo", resolve_here)
        patch.setenv("SPARSE_INTERP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("NO_PROXY", ",".join(LOOPBACK))
        for name in ("SPARSE_INTERP_OFFLINE", "SPARSE_INTERP_MIRROR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def close_figures():
    """Close what a test drew: matplotlib keeps every figure that nobody closes, and warns after twenty."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that the whole run shares, `browser.py`; tests skip where there is none."""
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if binary is None or not hasattr(os, "posix_spawn"):
        pytest.skip("no chromium or google-chrome on PATH, so no page was opened (Debian: apt-get install chromium)")
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["browser"] = importlib.util.module_from_spec(spec)  # where its dataclass looks for its names
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = module.Browser(binary, profile)
        yield started
        started.close()


# -- the smallest models in which every mechanism is at work -----------------------------------------------------------

VARIANTS = {
    "plain": {},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3},
    "no positions": {"positions": "none"},
    "layer norm": {"norm": "layer"},
    "layer norm without bias": {"norm": "layer", "norm_bias": False},
    "no norm": {"norm": "none", "initializer_range": 0.1},
    "tied": {"tie_unembed": True},
    "no sink": {"sink": False},
    "no bigram": {"bigram": False},
    "learnable bigram": {"bigram_learnable": True},
    "relu neurons": {"act_fn": "relu"},
    "bidirectional": {"attention_dir": "bidirectional"},
    "no AbsTopK": {"afrac": None},
    "AbsTopK at some sites": {"afrac_sites": ("q", "neuron", "attn_write")},
    "everything cut": {"afrac": 0.0},
    "residual relu": {"residual_act": "relu"},
    "residual cut": {"afrac_sites": ("resid_mid", "resid_post", "v")},
    "residual cut on entry": {"afrac_sites": ("resid_pre", "k")},
    "one entry kept": {"afrac": 0.01, "afrac_min": 1},
}
"""What differs from the plain model: 2 layers, 12 channels, 3 heads of 5, 20 neurons, 50 tokens, 16 positions."""


@pytest.fixture
def make_model():
    """`make_model(**changes)`: a model in eval mode with no bias, sink, gain or bigram entry at its initial value."""

    def make(tokenizer=None, **changes):
        from sparse_interp.model.config import ModelConfig  # after the hook that checks annotations
        from sparse_interp.model.transformer import HookedSparseTransformer

        shape = {"d_model": 12, "n_heads": 3, "d_head": 5, "n_layers": 2, "d_mlp": 20, "d_vocab": 50, "n_ctx": 16}
        config = shape | {"afrac": 0.4, "seed": 0, "initializer_range": 0.3} | changes
        model = HookedSparseTransformer(ModelConfig(**config), tokenizer)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in [*model.named_parameters(), *model.named_buffers()]:
                if name.rpartition(".")[2] not in ("W_E", "W_pos", "W_U") and (p.ndim == 1 or ".b_" in name):
                    p += 0.3 * torch.randn(p.shape, generator=noise).to(p)
                elif name == "bigram_table":
                    p += torch.randn(p.shape, generator=noise).to(p)
        return model.eval()

    return make


@pytest.fixture(params=VARIANTS, ids=str)
def any_model(request, make_model):
    """Every kind of model in turn."""
    return make_model(**VARIANTS[request.param])


@pytest.fixture(params=[name for name in VARIANTS if not name.startswith("residual")], ids=str)
def any_additive_model(request, make_model):
    """Every kind of model whose stream is the sum of what was written to it."""
    return make_model(**VARIANTS[request.param])


@pytest.fixture
def plain_model(make_model):
    """The plain model: AbsTopK at the eight sites, sink, biases, bigram table, RMSNorm, added positions."""
    return make_model()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three sequences of seven tokens of the small vocabulary."""
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(2))


# -- dense models of TransformerLens -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dense_script():
    """`model/dense_script.py`, which makes dense models and also runs by itself on any supported TransformerLens."""
    spec = importlib.util.spec_from_file_location("dense_script", Path(__file__).parent / "model" / "dense_script.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_bridge(dense_script):
    """`make_bridge(**kind)`: a native TransformerBridge of 50 tokens with random weights, and those weights."""

    def make(**kind):
        shape = dense_script.shape_of(50, **{"norm": "rms"} | kind)
        weights = dense_script.random_weights(shape)
        return dense_script.bridge(shape, weights), weights

    return make


# -- pairs of prompts, and a model of each kind ------------------------------------------------------------------------

KINDS = ("sparse", "dense", "bridge")


@pytest.fixture
def pairs():
    """Three pairs of 7, 4 and 5 tokens that differ in their second token alone, padded with token 0."""
    from sparse_interp.tasks.task import TaskBatch

    drawn = torch.Generator().manual_seed(5)
    clean, other = torch.randint(1, 50, (2, 3, 7), generator=drawn)
    corrupt = torch.where(torch.arange(7) == 1, other, clean)
    lengths = torch.tensor([7, 4, 5])
    clean, corrupt = (tokens.masked_fill(torch.arange(7) >= lengths[:, None], 0) for tokens in (clean, corrupt))
    answer, foil = torch.tensor([3, 4, 5]), torch.tensor([13, 14, 15])
    return TaskBatch(clean, corrupt, answer, foil, lengths, torch.zeros(3, dtype=torch.long))


@pytest.fixture
def alone(pairs):
    """Each of the pairs as a batch of its own, without padding."""
    from dataclasses import replace

    rows = [(pairs.rows(slice(i, i + 1)), int(pairs.lengths[i])) for i in range(len(pairs))]
    return [replace(row, clean=row.clean[:, :n], corrupt=row.corrupt[:, :n]) for row, n in rows]


built = {}


@pytest.fixture(params=KINDS)
def any_kind(request, make_model, make_bridge):
    """A sparse model, a dense one of ours, a dense one of TransformerLens; made once, since nothing changes them."""
    if request.param not in built:
        makers = {"bridge": lambda: make_bridge()[0], "sparse": make_model, "dense": lambda: make_model(afrac=None)}
        built[request.param] = makers[request.param]()
    return built[request.param]


# -- a model whose algorithm is known ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def truth():
    """The hand-built quote model, its task and its key."""
    from sparse_interp.faithfulness.ground_truth import ground_truth  # after the hook that checks annotations

    return ground_truth("quote")


@pytest.fixture(scope="session")
def dense_truth(truth, dense_script):
    """The quote model without sinks and with positions of zero, which a TransformerBridge can be too: ours, and one."""
    from sparse_interp.model.transformer import HookedSparseTransformer

    cfg = type(truth.model.cfg).from_dict(truth.model.cfg.to_dict() | {"sink": False, "positions": "add"})
    ours = HookedSparseTransformer(cfg, truth.task.tokenizer).eval()
    zeros = {"pos_embed.W_pos": torch.zeros(cfg.n_ctx, cfg.d_model)}
    ours.load_state_dict({n: w for n, w in truth.model.state_dict().items() if not n.endswith("sink")} | zeros)
    names = ("n_layers", "n_ctx", "d_model", "n_heads", "d_head", "d_mlp", "norm")
    shape = dense_script.shape_of(cfg.d_vocab, act=cfg.act_fn, **{name: getattr(cfg, name) for name in names})
    return ours, dense_script.bridge(shape, ours.state_dict(), truth.task.tokenizer)
