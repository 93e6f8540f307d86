"""torch's private names do what engine.torch_internals says of them, and nothing else in engine touches one."""

import ast
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.fsdp import FSDPModule, fully_shard

from engine.distributed.world import make_mesh, process_group
from engine.torch_internals import (
    add_each,
    all_groups,
    allow_variants,
    copy_each_,
    descend_each_,
    file_prefix,
    forget_forwards,
    graph_breaks,
    graphs_compiled,
    has_cpp_compiler,
    keeping,
    lerp_each_,
    norm_each,
    scale_each,
    set_group_timeout,
    stored_chunk,
    subtract_each,
    watching,
    without_data,
)

ROOT = Path(__file__).parents[1]
TOPS = ("engine", "models")
# Private names of others than torch; a namedtuple's are documented.
ELSEWHERE = {"_exit", "_asdict", "_replace", "_fields", "_make"}


def pairs() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    one, other = ([torch.randn(shape, generator=generator) for shape in ((3,), (2, 4), ())] for _ in range(2))
    return one, other


def test_lists_of_tensors():
    a, b = pairs()
    expected = {
        "add": [x + 0.5 * y for x, y in zip(a, b, strict=True)],
        "subtract": [x - y for x, y in zip(a, b, strict=True)],
        "scale": [x * y for x, y in zip(a, (2.0, -0.3, 0.0), strict=True)],
        "lerp": [x + 0.25 * (y - x) for x, y in zip(a, b, strict=True)],
    }
    norm_A = torch.stack([x.double().norm() for x in a])
    torch.testing.assert_close(list(add_each(a, b, factor=0.5)), expected["add"])
    torch.testing.assert_close(list(subtract_each(a, b)), expected["subtract"])
    torch.testing.assert_close(list(scale_each(a, torch.tensor([2.0, -0.3, 0.0]))), expected["scale"])
    torch.testing.assert_close(norm_each(a), norm_A)
    assert norm_each([torch.full((2,), 3e38)]).isfinite().all()
    places = [x.data_ptr() for x in a]
    lerp_each_(a, b, 0.25)
    torch.testing.assert_close(a, expected["lerp"])
    copy_each_(a, b)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [x.data_ptr() for x in a] == places


@pytest.mark.parametrize("unless", [None, torch.tensor(0.0)])
def test_a_descent_with_momentum(unless):
    a, b = pairs()
    averages = [torch.full_like(x, 3.0) for x in a]
    new_averages = [0.5 * 3.0 + y for y in b]
    expected = [x - 0.1 * average for x, average in zip(a, new_averages, strict=True)]
    descend_each_(a, b, averages, momentum=0.5, lr=0.1, unless=unless)
    torch.testing.assert_close(averages, new_averages)
    torch.testing.assert_close(a, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1.0])
def test_a_descent_that_must_not_be_writes_nothing(bad):
    a, b = pairs()
    a[0][0] = -0.0  # which any sum with 0 would turn into 0
    averages, steps = [torch.full_like(x, -0.0) for x in a], [torch.full_like(x, bad) for x in b]
    before = [x.clone().view(torch.int32) for x in (*a, *averages)]
    descend_each_(a, steps, averages, momentum=0.5, lr=0.1, unless=torch.tensor(1.0))
    assert all(torch.equal(x.view(torch.int32), bits) for x, bits in zip((*a, *averages), before, strict=True))


def test_fsdp_forgets_forwards_without_backward():
    """And would not by itself: the day that torch does, the function can go."""

    def notes(root: nn.Module) -> int:
        states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]
        return sum(len(state._comm_ctx.post_forward_order) for state in states)

    with process_group() as world:
        mesh = make_mesh(world, "full", 1)
        remembering, forgetting = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(world.device) for _ in range(2))
        for network in (remembering, forgetting):
            for module in (*network, network):
                fully_shard(module, mesh=mesh)
        forget_forwards(forgetting)
        for _ in range(3):
            remembering(torch.ones(1, 2, device=world.device))
            forgetting(torch.ones(1, 2, device=world.device))
        assert notes(remembering) > 0
        assert notes(forgetting) == 0


@torch._dynamo.config.patch(recompile_limit=1)
def test_as_many_variants_as_allowed_are_compiled():
    config = torch._dynamo.config
    allow_variants(3)
    assert config.recompile_limit == 3
    allow_variants(2)
    assert config.recompile_limit == 3
    compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True, dynamic=False)
    for size in range(1, 4):
        compiled(torch.ones(size))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(torch.ones(4))


def test_graphs_and_their_breaks_are_counted():
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    whole = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    graphs, breaks = graphs_compiled(), graph_breaks()
    for size in (1, 2, 2):
        whole(torch.ones(size))
    assert (graphs_compiled() - graphs, graph_breaks() - breaks) == (2, 0)
    torch.compile(broken, backend="eager", dynamic=False)(torch.ones(1))
    assert (graphs_compiled() - graphs, graph_breaks() - breaks) == (4, 1)


def test_compiled_code_keeps_as_little_as_asked():
    """For sin(sin(...)) of a product: all that its backward pass needs, what is dear, and the inputs alone."""

    def chain(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        for _ in range(6):
            y = y.sin()
        return y @ w

    def kept(share: float) -> tuple[int, list[Tensor]]:
        x, w = (torch.linspace(0, 1, 64).view(8, 8).requires_grad_() for _ in range(2))
        held: set[int] = set()

        def hold(tensor: Tensor) -> Tensor:
            held.add(tensor.data_ptr())
            return tensor

        compiled = torch.compile(chain, fullgraph=True, backend=keeping(share, "aot_eager_decomp_partition"))
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            y = compiled(x, w)
        y.sum().backward()
        return len(held), [x.grad, w.grad]

    (inputs, found), (some, as_some), (_, expected) = kept(0.0), kept(0.5), kept(1.0)
    assert (inputs, some) == (2, 3)
    torch.testing.assert_close([found, as_some], [expected, expected])
    assert keeping(0.5) is keeping(0.5)
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.parametrize(("compiler", "there"), [("true", True), ("no-such-compiler", False)])
def test_the_compiler_is_looked_for_where_torch_looks(compiler, there):
    from torch._inductor import config

    with config.patch({"cpp.cxx": (compiler,)}):
        assert has_cpp_compiler() is there


def test_tensors_without_data_act_as_on_their_device():
    with torch.device("meta"):
        layer = nn.Linear(4, 1 << 40)
    with without_data():
        assert layer.to_empty(device="cpu")(torch.empty(1 << 20, 4)).shape == (1 << 20, 1 << 40)
        assert layer.weight.device.type == "cpu"


def test_operations_are_watched():
    seen = []
    with watching(lambda operation, results: seen.append((operation.overloadpacket.__name__, results))):
        y = torch.ones(2) + 1
    assert (seen[0][0], seen[-1][0]) == ("ones", "add")
    assert seen[-1][1] is y


@pytest.mark.filterwarnings("error")
def test_a_groups_timeout_can_be_changed():
    """What that does to ranks is tested with real ones."""
    with process_group() as world:
        assert {world.group, world.host_group, world.save_group, world.roll_group} == set(all_groups())
        set_group_timeout(world.host_group, timedelta(seconds=7))


def test_a_stored_chunk_is_what_torch_writes(tmp_path):
    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=not dist.is_initialized())
    (info,) = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    assert stored_chunk(info.relative_path, info.offset, info.length) == info


def test_a_rank_names_its_files_as_torch_does(tmp_path):
    plans = dcp.FileSystemWriter(tmp_path).prepare_global_plan([SavePlan([])] * 4)
    assert [plan.storage_data for plan in plans] == [file_prefix(rank) for rank in range(4)]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Functions, classes, and attributes that a file gives its objects."""
    found = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


def used(tree: ast.Module) -> set[str]:
    """Attributes, what is imported from torch, and what getattr is given."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                found.add(name)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "torch":
                found |= {*module.split("."), *(alias.name for alias in node.names)}
            case ast.Import():
                found |= {part for alias in node.names for part in alias.name.split(".")}
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                found.add(name)
    return found


def foreign(top: str) -> dict[str, set[str]]:
    """By file, the private names that it uses and that no file of engine or models defines."""
    trees = {path: ast.parse(path.read_text()) for part in TOPS for path in sorted((ROOT / part).rglob("*.py"))}
    own = set().union(*map(defined, trees.values())) | ELSEWHERE
    names = {str(path.relative_to(ROOT)): set(filter(private, used(tree) - own)) for path, tree in trees.items()}
    return {path: found for path, found in names.items() if found and path.startswith(f"{top}/")}


def test_no_other_file_touches_them():
    """What turns up here belongs into engine/torch_internals.py, with a test."""
    found = foreign("engine")
    assert set(found) == {"engine/torch_internals.py"}, found


def test_models_keep_few_of_their_own():
    allowed = {
        "models/moco.py": {"_foreach_lerp_"},
        "models/norm.py": {"_functional_collectives", "_c10d_functional", "_BatchNorm"},
        "models/dry_step.py": {"_python_dispatch", "_schema", "_version"},
    }
    found = foreign("models")
    assert all(names <= allowed.get(path, set()) for path, names in found.items()), found


def test_a_lerp_is_the_average_of_the_momentum_encoder():
    base, momentum = [torch.full((3,), 2.0)], [torch.zeros(3)]
    lerp_each_(momentum, base, 1 - 0.75)
    assert momentum[0].tolist() == [0.5] * 3
    assert base[0].tolist() == [2.0] * 3
    lerp_each_(base, base, 1 - 0.3)
    assert base[0].tolist() == [2.0] * 3  # equal encoders stay as they are, to the bit
