"""Steps that an earlier process has compiled, found again without the compiler.

Torch keeps what it has compiled, and finds it again; but to look it up takes the whole compiler: half of the CPU time
of a process that compiles nothing. On the CPU a compiled step is one library, with a function of all inputs. It is
copied into a folder beside torch's own, under a name that is made of all that it rests on, and called directly by the
next process. Where anything is not as simple as that, torch compiles, or finds, the step as ever.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.nn import Parameter

Compiled = Callable[..., Any]

FORMAT = 1
"""Of the files; another one where what is kept, or how it is called, has changed."""
ENTRY = "inductor_entry_cpp"
"""The function of a library, and so the name of the Python module that it is."""
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
OF_ENVIRONMENT = re.compile(r"(TORCHINDUCTOR|TORCHDYNAMO|TORCH_COMPILE|AOT|ATEN|CXX|CPATH|CPLUS|CFLAGS|LDFLAGS)")

TORCHS_OWN = (
    "_C._aoti.unsafe_alloc_void_ptrs_from_tensors",
    "_C._aoti.alloc_tensors_by_stealing_from_void_ptrs",
    "_C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr",
    "autograd.graph.increment_version",
    "utils.deterministic.fill_uninitialized_memory",
)
"""What of torch's own parts a library is loaded and called with."""

_loaded: dict[str, Compiled] = {}


class NotPlainError(Exception):
    """Something in a graph has no name that would be the same in another process."""


# What a step rests on


def name_of(graph: GraphModule, inputs: Sequence[Any], options: Sequence[str]) -> str | None:
    """Return a name that two compiled steps have only where they are the same; None where there is no such name.

    Args:
        graph: What is compiled.
        inputs: Tensors like its inputs.
        options: The compiler's.
    """
    if not is_wanted():
        return None
    try:
        operations = list(of_graph(graph))
        offsets = any(".as_strided" in told for told in operations)  # which tell where a tensor begins in its memory
        parts = [*operations, *of_inputs(inputs, offsets), *of_process(), *options]
    except NotPlainError:
        return None
    return sha256("\n".join(parts).encode()).hexdigest()


def is_wanted() -> bool:
    """Return whether torch's caches are on, which is asked of what has been imported alone."""
    if sys.platform != "linux" or torch.is_autocast_enabled("cpu"):
        return False
    try:
        attrgetter(*TORCHS_OWN)(torch)
    except AttributeError:
        return False  # another torch, which calls its libraries otherwise
    if "1" in (os.environ.get(f"TORCH{name}_FORCE_DISABLE_CACHES") for name in ("INDUCTOR", "_COMPILE")):
        return False
    if os.environ.get("TORCHINDUCTOR_FX_GRAPH_CACHE") == "0":
        return False
    config = sys.modules.get("torch._inductor.config")
    return config is None or bool(config.fx_graph_cache and not config.force_disable_caches)


def of_graph(graph: GraphModule) -> Iterator[str]:
    """Describe the operations of a graph, each with what it is given, and what comes of it.

    Raises:
        NotPlainError: One is not of torch's own, or is given something else than nodes and plain values.
    """
    for node in graph.graph.nodes:
        if node.op == "call_function":
            target = target_of(node.target)
        elif node.op in ("placeholder", "output"):
            target = str(node.target)
        else:
            raise NotPlainError(node.op)
        if target.startswith("profiler."):  # marks for a profiler
            continue
        made = form_of(node.meta.get("val")) if node.op == "call_function" else ""
        yield f"{node.op} {node.name} {target} {plain(node.args)} {plain(node.kwargs)} {made}"


def target_of(target: Any) -> str:
    """Return the name of an operation of torch's own, or of Python's."""
    if isinstance(target, OpOverload) and target.namespace in ("aten", "prims", "profiler"):
        return str(target)
    if isinstance(target, (BuiltinFunctionType, FunctionType)) and target.__module__ in ("_operator", "math"):
        return f"{target.__module__}.{target.__name__}"
    raise NotPlainError(target)


def plain(value: Any) -> str:
    """Write what an operation is given."""
    if isinstance(value, Node):
        return f"%{value.name}"
    if type(value) in (tuple, list) or isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({','.join(map(plain, value))})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{plain(each)}' for name, each in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{plain((value.start, value.stop, value.step))}"
    if type(value) in PLAIN:
        return repr(value)
    raise NotPlainError(value)


def form_of(value: Any) -> str:
    """Describe the tensors that an operation returns."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_complex():
            raise NotPlainError(value)
        return f"{value.dtype}{value.device}{tuple(map(int, value.shape))}{tuple(map(int, value.stride()))}"
    if isinstance(value, (tuple, list)):
        return ",".join(map(form_of, value))
    return plain(value)


def of_inputs(inputs: Sequence[Any], offsets: bool) -> Iterator[str]:
    """Describe the inputs, and which of them share memory."""
    memory: dict[int, int] = {}
    for number, tensor in enumerate(inputs):
        if type(tensor) not in (Tensor, Parameter) or tensor.is_neg() or not tensor.is_cpu:
            raise NotPlainError(tensor)
        shared = memory.setdefault(tensor.untyped_storage()._cdata, number)
        begins = tensor.storage_offset() if offsets or shared != number else 0
        yield f"{form_of(tensor)} {begins} {tensor.requires_grad} {shared}"


def of_process() -> Iterator[str]:
    """Describe what else a compiled step rests on: versions, the processor, and what was set for all of torch."""
    yield f"{FORMAT} {torch.__version__} {torch.version.git_version} {sys.version} {platform.platform()} {processor()}"
    yield str(torch.get_num_threads())
    backend, filling = attrgetter("backends.mkldnn", "utils.deterministic.fill_uninitialized_memory")(torch)
    yield f"{backend.is_available()} {backend.enabled} {torch.are_deterministic_algorithms_enabled()} {filling}"
    yield f"{torch.get_float32_matmul_precision()} {torch.get_default_dtype()}"
    yield from (
        f"{k}={v}" for k, v in sorted(os.environ.items()) if OF_ENVIRONMENT.match(k) and k != "TORCHINDUCTOR_CACHE_DIR"
    )
    for module in ("torch._inductor.config", "torch._functorch.config"):
        yield f"{module} {plain(changed_options(sys.modules.get(module)))}"
    for name in ("kept.py", "layouts.py", "graphs.py"):  # which say how steps are compiled
        yield sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()


def changed_options(config: Any) -> dict[str, Any]:
    """Return the options of a part of torch that have been set; those that were put back are as they were."""
    options = {} if config is None else config.get_config_copy()
    own = {} if config is None else config._config
    return {k: v for k, v in sorted(options.items()) if not config._is_default(k) and v != own[k].default}


@cache
def processor() -> str:
    """Name the processor and what it can do: a library is compiled for this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.partition(":")[0].strip().lower() in ("model name", "flags", "features")]
    return f"{torch.backends.cpu.get_cpu_capability()} {' '.join(told)}"


# Where it is kept


def folder() -> Path:
    """Return where compiled steps are kept: beside torch's own, which its variable names."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given is None:
        try:
            user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        except (KeyError, ImportError, OSError):  # in a container a user may have no name
            user = f"uid_{os.getuid()}"
        given = str(Path(tempfile.gettempdir()) / f"torchinductor_{user}")
    return Path(given).absolute() / "fluxloop"


def find(name: str) -> Compiled | None:
    """Return a step that was compiled before, None where there is none, or it is not whole."""
    if name in _loaded:
        return _loaded[name]
    library, told = folder() / f"{name}.so", folder() / f"{name}.json"
    try:
        found = json.loads(told.read_text(encoding="utf-8"))
        if library.stat().st_uid != os.getuid() or sha256(library.read_bytes()).hexdigest() != found["sha256"]:
            return None
        compiled = Direct(load(name, library), found["changed"])
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None  # it is compiled anew
    _loaded[name] = compiled
    return compiled


def load(name: str, library: Path) -> Compiled:
    """Load a library, and return its function."""
    # what torch sets before it loads one: where the function is that gives a tensor's memory
    pointer = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]  # torch's own
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(pointer)
    spec = spec_from_file_location(f"fluxloop_{name}.{ENTRY}", library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no library")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    entry: Compiled = getattr(module, ENTRY)
    return entry


class Direct:
    """A library's function, called as torch's wrapper around it does.

    Args:
        entry: The function.
        changed: Which of its inputs it changes in place, as autograd has to know.
    """

    def __init__(self, entry: Compiled, changed: Sequence[int]) -> None:
        self.changed = changed
        self._entry = entry
        self._to_handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Call the function, where gradients are off; count no change."""
        return tensors_of_handles(self._entry(self._to_handles(inputs)))

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Call the function, and count what it changes."""
        outputs = self.run(list(inputs))
        torch.autograd.graph.increment_version([inputs[number] for number in self.changed])
        return outputs


def tensors_of_handles(handles: Any) -> list[Tensor]:
    """Return the tensors that a library has made."""
    found: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)
    return found


# How it comes there


class Fresh:
    """A step that torch has just compiled: its first call shows whether it can be kept.

    Args:
        compiled: The step.
        name: Of what it rests on.
        module: What torch has made of it.
    """

    def __init__(self, compiled: Compiled, name: str, module: ModuleType) -> None:
        self.compiled = self.__wrapped__ = compiled
        self.direct: Direct | None = None
        """The same without torch's wrapper, once it is kept."""
        self._name = name
        self._module = module

    def __call__(self, *inputs: Tensor) -> Any:
        """Call it, and keep its library where that alone was called, with these inputs and for these outputs."""
        versions = [tensor._version for tensor in inputs]
        with noting() as (given, returned):
            outputs = list(self.compiled(*inputs))
        changed = [n for n, (t, before) in enumerate(zip(inputs, versions, strict=True)) if t._version != before]
        if same(given, inputs) and same(returned, outputs):
            self._keep(changed)
        return outputs

    def _keep(self, changed: list[int]) -> None:
        entry = self._module.inductor_entry
        library = Path(entry.__self__.__file__).read_bytes()
        told = json.dumps({"sha256": sha256(library).hexdigest(), "changed": changed})
        try:
            folder().mkdir(parents=True, exist_ok=True)
            for ending, content in ((".so", library), (".json", told.encode())):
                with tempfile.TemporaryDirectory(dir=folder()) as place:  # gone too where the disk is full
                    made = Path(place) / "made"
                    made.write_bytes(content)
                    os.replace(made, folder() / f"{self._name}{ending}")
        except OSError:
            return  # a full disk, or a folder that is not ours: torch compiles, or finds, the step next time
        self.direct = _loaded[self._name] = Direct(entry, changed)


def same(some: list[Any], others: Sequence[Any]) -> bool:
    """Return whether two lists hold the same objects, in one order."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


@contextmanager
def noting() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Note the tensors that compiled libraries are called with, and those that they return."""
    given, returned = list[Tensor](), list[Tensor]()
    place: Any = torch._C._aoti
    to_handles, to_tensors = place.unsafe_alloc_void_ptrs_from_tensors, place.alloc_tensors_by_stealing_from_void_ptrs

    def note_given(tensors: list[Tensor]) -> Any:
        given.extend(tensors)
        return to_handles(tensors)

    def note_returned(handles: Any) -> list[Tensor]:
        found: list[Tensor] = to_tensors(handles)
        returned.extend(found)
        return found

    place.unsafe_alloc_void_ptrs_from_tensors = note_given
    place.alloc_tensors_by_stealing_from_void_ptrs = note_returned
    try:
        yield given, returned
    finally:
        place.unsafe_alloc_void_ptrs_from_tensors = to_handles
        place.alloc_tensors_by_stealing_from_void_ptrs = to_tensors


def modules_made() -> list[ModuleType]:
    """List the modules that torch has made of graphs, in this process."""
    cache: Any = sys.modules.get("torch._inductor.codecache")
    return [] if cache is None else list(cache.PyCodeCache.modules)


def fresh(compiled: Compiled, name: str, before: Sequence[ModuleType]) -> Compiled:
    """Return a step that was just compiled as one that may be kept, where torch has made one library of it.

    Args:
        compiled: The step.
        name: Of what it rests on.
        before: What `modules_made` gave before it was compiled.
    """
    made = [module for module in modules_made() if all(module is not known for known in before)]
    entry = getattr(made[0], "inductor_entry", None) if len(made) == 1 else None
    library = getattr(getattr(entry, "__self__", None), "__file__", None)
    if library is None or "custom_op_wrapper" in Path(made[0].__file__ or "").read_text(encoding="utf-8"):
        return compiled  # there are several, or it calls back into Python
    return Fresh(compiled, name, made[0])
