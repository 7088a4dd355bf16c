"""Build the TensorRT engines of a bundle: rewrite its graphs, compile them, and record what they were built from.

TensorRT-RTX compiles ahead of time, for GPUs that need not be present; the full TensorRT times kernels on the GPU at
hand.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

from healthgpt_edge.bundle import ENGINES, Bundle
from healthgpt_edge.engines import (
    FORMAT,
    LANGUAGE,
    RECORD,
    VERSION,
    EngineEntry,
    EngineRecord,
    Settings,
    engine_graphs,
    folder,
    import_tensorrt,
    ingredients,
)
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors.cuda import CudaArray, own_kernels
from healthgpt_edge.executors.hlora_plugin import register
from healthgpt_edge.executors.tensorrt_engine import RTX, Log
from healthgpt_edge.files import flush_folder
from healthgpt_edge.manifest import Manifest

from ..weights import WeightFile
from .graphs import read_graph
from .lower import CACHES, lower
from .merge import Padding, merge
from .plugin import KERNEL, use_plugin

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Types that products may have, by precision, the default first: float32 stays exact, bfloat16 keeps its range.
_COMPUTE = {"fp32": ("fp32",), "bf16": ("bf16",)} | dict.fromkeys(("fp16", "int8", "int4"), ("fp16", "bf16"))
DEFAULT_CONTEXT_TOKENS, DEFAULT_ROWS, DEFAULT_PREFILL_ROWS = 4096, 64, 1024
# TensorRT optimises prefill for a picture's features and a question of so many tokens.
_TYPICAL_WORDS = 48

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, typical, largest


def default_settings(
    manifest: Manifest,
    compute_capabilities: tuple[str, ...] = (),
    compute: str | None = None,
    max_context: int | None = None,
    max_rows: int = DEFAULT_ROWS,
    plugin: bool = False,
    stream_weights: bool = False,
) -> Settings:
    """The settings of a build. By default products are float16, except in fp32 and bf16 bundles, and the context is
    what the base allows, up to 4096 tokens. Raises ExecutorError."""
    longest = manifest.language.max_positions
    context = min(longest, DEFAULT_CONTEXT_TOKENS) if max_context is None else max_context
    if context > longest:
        raise ExecutorError(f"max_context must be at most the base's {longest} positions, got {context}")
    choices = _COMPUTE[manifest.precision]
    compute = choices[0] if compute is None else compute
    if compute not in choices:
        raise ExecutorError(
            f"compute of a bundle in {manifest.precision} must be {' or '.join(choices)}, found {compute!r:.40}"
        )
    if plugin and compute != "fp16":
        raise ExecutorError(f"the plugin multiplies float16: compute must be fp16, got {compute}")
    rows = min(max_rows, context) if max_context is None else max_rows
    prefill_rows = max(rows, min(DEFAULT_PREFILL_ROWS, context))
    return Settings(compute, compute_capabilities, context, rows, prefill_rows, plugin, stream_weights)


def build_engines(
    bundle: Bundle,
    target: str,
    settings: Settings,
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> EngineRecord:
    """Build every engine of `bundle` for `target` (tensorrt-rtx or tensorrt) into `engines/<target>/`.

    Existing engines are replaced once all new ones are built, and stay if one fails. `on_step(name, done, total)`
    reports progress. Raises ExecutorError.
    """
    compiler = Compiler(import_tensorrt(target), target, settings)
    version = compiler.version
    graphs = engine_graphs(bundle.manifest)
    entries = {}
    with new_folder(bundle, target) as work:
        for index, (name, files) in enumerate(graphs.items()):
            on_step(name, index, len(graphs))
            begin = time.perf_counter()
            with WeightFile(work / "stacked.bin", f"{ENGINES}/{work.name}/stacked.bin") as stacked:
                model = engine_model(bundle, name, files, settings, stacked)
            plan = compiler.compile(name, model, bundle)
            data = memoryview(plan)
            (work / f"{name}.engine").write_bytes(data)
            entries[name] = EngineEntry(
                size=data.nbytes,
                sha256=hashlib.sha256(data).hexdigest(),
                built_from=ingredients(bundle.manifest, name, target, version, settings),
                seconds=round(time.perf_counter() - begin, 2),
            )
            del plan, data
        (work / "stacked.bin").unlink()
        on_step("record", len(graphs), len(graphs))
        record = EngineRecord(FORMAT, VERSION, target, version, settings, entries)
        (work / RECORD).write_text(record.to_json())
    return record


def engine_model(
    bundle: Bundle, name: str, files: tuple[str, ...], settings: Settings, stacked: WeightFile
) -> ModelProto:
    """The graph that TensorRT gets for engine `name`, its weights those of the bundle and `stacked`.

    Raises ExecutorError for a graph that is damaged, or whose weights lie elsewhere.
    """
    models = [read_graph(bundle, file) for file in files]
    if name != LANGUAGE:
        return lower(models[0], TYPES[settings.compute])
    tasks = dict(zip(sorted(bundle.manifest.tasks), models, strict=True))
    merged = merge(tasks, bundle.path, stacked, KERNEL if settings.plugin else Padding())
    if settings.plugin:
        use_plugin(merged)
    return lower(merged, TYPES[settings.compute], settings.max_context)


@contextmanager
def new_folder(bundle: Bundle, target: str) -> Iterator[Path]:
    """A temporary folder among the engines that takes the target's place on success and is removed on failure."""
    place = folder(bundle, target)
    try:
        place.parent.mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target}.", dir=place.parent))
    except OSError as error:
        raise ExecutorError(f"cannot write engines into {bundle.path.name[:100]!r}: {error.strerror}") from error
    old = work.with_name(f"{work.name}.old")
    try:
        yield work
        work.chmod(0o755)
        flush_folder(work)
        if place.exists():
            place.rename(old)
        work.rename(place)
    except OSError as error:
        raise ExecutorError(f"cannot write the engines of {target}: {error.strerror}") from error
    finally:
        if old.exists() and not place.exists():  # stopped between the two renames
            old.rename(place)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class Compiler:
    """One TensorRT as a compiler of engines."""

    def __init__(self, trt: Any, target: str, settings: Settings) -> None:
        self.trt, self.settings = trt, settings
        self.version = str(trt.__version__)
        self.label = f"{target} {self.version}"
        self.log = Log(trt)
        if target != RTX and settings.compute_capabilities:
            raise ExecutorError("the full TensorRT builds for the GPU at hand: compute capabilities are tensorrt-rtx's")
        if settings.plugin:
            if target == RTX:
                raise ExecutorError("TensorRT-RTX takes no plugins of others: --plugin goes with --target tensorrt")
            register(trt, own_kernels(), CudaArray)

    def parse(self, name: str, model: ModelProto, bundle: Bundle) -> tuple[Any, Any]:
        """TensorRT's builder and its network of `model`, whose weights lie in `bundle`."""
        trt = self.trt
        try:
            builder = trt.Builder(self.log.logger)
        except (TypeError, RuntimeError) as error:  # pybind11's errors for a null pointer
            raise ExecutorError(f"{self.label} cannot build here: {self.log.reason}") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.log.logger)
        if not parser.parse(model.SerializeToString(), str(bundle.path / f"{name}.onnx")):
            reasons = " ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise ExecutorError(f"{self.label} cannot read the graph {name}: {reasons[:300]}")
        if name == LANGUAGE:
            self._set_attention(network)
        return builder, network

    def compile(self, name: str, model: ModelProto, bundle: Bundle) -> Any:
        """The serialized engine of `model`, a buffer."""
        builder, network = self.parse(name, model, bundle)
        config = self.configure(name, builder)
        for shapes in self._profiles(name, network, bundle.manifest):
            profile = builder.create_optimization_profile()
            for tensor, (least, typical, most) in shapes.items():
                give = profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape
                give(tensor.name, least, typical, most)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ExecutorError(f"{self.label} cannot build the engine {name}: {self.log.reason}")
        return plan

    def configure(self, name: str, builder: Any) -> Any:
        """TensorRT's configuration for engine `name`, without its profiles."""
        trt, config = self.trt, builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.settings.compute == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        if self.settings.stream_weights and name == LANGUAGE:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        self._choose_gpus(config)
        return config

    def _choose_gpus(self, config: Any) -> None:
        capabilities = self.settings.compute_capabilities
        if not capabilities:
            return
        known = {
            f"{member[2:-1]}.{member[-1]}": value
            for member, value in self.trt.ComputeCapability.__members__.items()
            if member.startswith("SM")
        }
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            if capability not in known:
                raise ExecutorError(
                    f"{self.label} builds for the compute capabilities {', '.join(sorted(known))}, found {capability}"
                )
            config.set_compute_capability(known[capability], index)

    def _set_attention(self, network: Any) -> None:
        """Let attention run as single operators where no kernel fits, and tell it how much of the cache is filled.

        The mask alone decides what is seen; the length keeps a kernel from reading what the mask would throw away,
        where this TensorRT can be told.
        """
        trt = self.trt
        inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
        shape = network.add_cast(network.add_shape(inputs["token_ids"]).get_output(0), trt.int64).get_output(0)
        rows = network.add_slice(shape, (1,), (1,), (1,)).get_output(0)
        length = network.add_elementwise(inputs["past_length"], rows, trt.ElementWiseOperation.SUM).get_output(0)
        length = network.add_cast(length, trt.int32).get_output(0)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python is told a layer's own class
                layer.attention.decomposable = True
                if hasattr(layer.attention, "key_value_lengths"):
                    layer.attention.key_value_lengths = length

    def _profiles(self, name: str, network: Any, manifest: Manifest) -> list[dict[Any, Any]]:
        """The shapes of each profile: of `language` decode and prefill, of the others the only one."""
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        if name != LANGUAGE:
            rows = {"hidden": (1, self.settings.max_rows)}  # of the vocabulary's
            return [{tensor: _shapes(tensor, rows) for tensor in inputs}]
        settings, patches = self.settings, manifest.vision.patches
        typical = min(settings.prefill_rows, patches + _TYPICAL_WORDS)
        profiles: list[dict[Any, Any]] = []
        for new in ((1, settings.max_rows), (typical, settings.prefill_rows)):
            ranges = {"token_ids": new, "image_features": (patches, patches)}
            shapes = {tensor: _shapes(tensor, ranges) for tensor in inputs if not tensor.is_shape_tensor}
            positions = {tensor: ([0], [1], [settings.max_rows]) for tensor in inputs if tensor.is_shape_tensor}
            profiles.append(shapes | positions)
        return profiles


def _shapes(tensor: Any, open_dimensions: dict[str, tuple[int, int]]) -> Shapes:
    """The shapes of an input with batch 1; where its second dimension is open, that is 1 to the greater number, and
    typically the smaller one."""
    shape = tuple(tensor.shape)
    if tensor.name.startswith(CACHES) or tensor.name not in open_dimensions:
        shape = tuple(1 if size < 0 else size for size in shape)
        return shape, shape, shape
    least, typical, most = ((1, size, *shape[2:]) for size in (1, *open_dimensions[tensor.name]))
    return least, typical, most
