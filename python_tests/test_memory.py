"""What is kept from step to step: the operators' working memory, and K Kᵀ of the factors."""

import calls
import pytest
import torch
from nets import snapshot, trained
from tolerance import assert_close_to_truth
from torch import Tensor, nn

from singd_ext import _C, SINGD, ops
from singd_ext.memory import keeps_product

DENSE = ("dense", "triu")
KEPT = [DENSE, ("diagonal", "block_diagonal:2"), ("hierarchical:1,1", "rank_tril:1")]


def train_step(net: nn.Module, optimizer: SINGD, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(9, 6, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("structures", KEPT)
def test_the_kept_product_follows_updates_and_edits_of_the_factor(
    structures: tuple[str, str],
) -> None:
    """A factor that is replaced or changed in place acts at the next step."""
    results = {}
    for change in ("none", "in place", "replaced"):
        torch.manual_seed(0)
        net = nn.Linear(6, 4).double()
        optimizer = SINGD(net, structures=structures, T=5, lr_cov=0.1)
        for seed in range(3):
            train_step(net, optimizer, seed)
        state = optimizer.state[net.weight]
        if change == "in place":
            state["K"].mul_(2)
        elif change == "replaced":
            state["K"] = 2 * state["K"]
        train_step(net, optimizer, 3)
        results[change] = net.weight.detach().clone()
    assert torch.equal(results["in place"], results["replaced"])
    assert not torch.equal(results["in place"], results["none"])


@pytest.mark.parametrize("structures", KEPT)
def test_the_kept_product_equals_two_products(structures: tuple[str, str]) -> None:
    """T = 1 makes the product anew in every step, an update that changes nothing keeps it."""

    def final(T: int) -> dict[str, Tensor]:
        model, optimizer = trained(range(4), structures=structures, T=T, lr_cov=1e-30)
        return {k: v for k, v in snapshot(model, optimizer).items() if k.endswith("weight")}

    torch.testing.assert_close(final(1), final(4), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("T", "kept"), [(1, False), (2, True)])
def test_products_of_sparse_factors_are_kept_where_a_step_without_update_follows(
    T: int, kept: bool
) -> None:
    net = nn.Linear(6, 4).double()
    optimizer = SINGD(net, structures=("diagonal", "block_diagonal:2"), T=T)
    train_step(net, optimizer, 0)
    _, products, *_ = optimizer._gatherer.memory(0).tensors()
    assert (products is not None and products.numel() > 0) == kept


@pytest.mark.parametrize("structures", [DENSE, ("diagonal", "block_diagonal:2")])
def test_outcomes_and_workspace_are_the_same_memory_in_every_step(
    structures: tuple[str, str],
) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    optimizer = SINGD(net, structures=structures, T=1)
    addresses = set()
    for seed in range(4):
        train_step(net, optimizer, seed)
        if seed > 0:
            tensors = optimizer._gatherer.memory(0).tensors()
            addresses.add(tuple(0 if t is None else t.data_ptr() for t in tensors))
    assert len(addresses) == 1


@pytest.mark.parametrize(
    ("dtype", "expm_order", "matrices"),
    [(torch.float32, 1, 2), (torch.float32, 2, 3), (torch.bfloat16, 1, 2), (torch.bfloat16, 2, 3)],
)
def test_a_dense_factor_update_has_few_matrices_in_its_workspace(
    dtype: torch.dtype, expm_order: int, matrices: int
) -> None:
    """The momentum and Kᵀ K of each of two factors in their dtype; two more matrices for E."""
    d = 320
    net = nn.Linear(d, d, bias=False, dtype=dtype)
    optimizer = SINGD(net, structures=DENSE, lr_cov=1e-3, T=1, expm_order=expm_order)
    net(torch.randn(2, d, dtype=dtype)).square().mean().backward()
    optimizer.step()
    workspace = optimizer._gatherer.memory(0).tensors()[0]
    assert workspace is not None
    matrix = d * d * dtype.itemsize
    assert 2 * matrices * matrix <= workspace.numel() <= (2 * matrices + 0.5) * matrix


def stepped(
    products: Tensor | None,
    factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Return a weight after a step with K = factor I and C = I, diagonal."""
    weight, empty = torch.zeros(3, 4, dtype=dtype), torch.empty(0)
    ops.preconditioned_update_(
        [weight], [empty], [], [], [torch.zeros((), dtype=torch.int64)],
        [torch.ones(3, 4, dtype=dtype)], [empty], [torch.full((4,), factor)], [torch.ones(3)],
        "diagonal", "diagonal", lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0,
        products=products, found_inf=found_inf,
    )  # fmt: skip
    return weight


def test_products_of_sparse_factors_are_used_as_long_as_they_are_handed_on() -> None:
    products = torch.empty(0, dtype=torch.uint8)
    first = stepped(products)
    assert products.numel() > 0
    assert torch.equal(stepped(products, factor=2.0), first)  # those of factor = 1
    products.resize_(0)
    assert torch.equal(stepped(products, factor=2.0), 4 * first)


@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:3", "rank_tril:2"])
def test_products_of_a_weight_that_lies_in_another_order_are_made_anew(spec: str) -> None:
    K, C = (calls.factor(spec, 8, seed, torch.float32) for seed in (1, 2))
    G = calls.numbers(8, 8, seed=3, dtype=torch.float32)

    def update(weight: Tensor, products: Tensor | None) -> Tensor:
        empty = torch.empty(0)
        ops.preconditioned_update_(
            [weight], [empty], [], [], [torch.zeros((), dtype=torch.int64)],
            [G.view(weight.shape)], [empty], [K], [C], spec, spec,
            lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0, products=products,
        )  # fmt: skip
        return weight

    kept = torch.empty(0, dtype=torch.uint8)
    rows, square = torch.zeros(8, 8), (8, 2, 2, 2)
    last = torch.zeros(square).to(memory_format=torch.channels_last)
    apart = torch.zeros(2, 8, 2, 2).transpose(0, 1)
    for weight in (rows, rows.T, rows, last, rows.view(square), last, apart, last, rows.T):
        assert torch.equal(update(weight.clone(), kept), update(weight.clone(), None))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_products_in_another_type_are_made_anew(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    products = torch.empty(0, dtype=torch.uint8)
    stepped(products, dtype=dtypes[0])
    assert torch.equal(stepped(products, 2.0, dtypes[1]), stepped(None, 2.0, dtypes[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["block_diagonal:30", "rank_tril:24", "hierarchical:15,15"])
def test_products_that_are_not_kept_are_made_of_every_group_of_layers(
    spec: str, dtype: torch.dtype
) -> None:
    """Each of these layers is a group of its own, and every third shares memory for P."""
    shapes = [calls.Shape(515, 510 + 3 * i, bool(i % 2)) for i in range(7)]
    kept = torch.empty(0, dtype=torch.uint8)
    calls.assert_same(
        *(
            calls.update_parameters(spec, spec, shapes, dtype, products=products)
            for products in (kept, kept, None)
        )
    )


def test_a_void_call_makes_no_products() -> None:
    """The next one does: memory must not pass for filled that is not."""
    products = torch.empty(0, dtype=torch.uint8)
    assert not stepped(products, found_inf=torch.ones(())).any()
    assert torch.equal(stepped(products), stepped(None))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_known_factors_are_the_same_tensors(count: int) -> None:
    """Other tensors, more or fewer of them: versions alone would not tell."""
    factors = [torch.ones(2), torch.ones(2)]
    known = _C.KnownFactors()
    assert not known.are(factors)
    assert known.are(list(factors))
    others = [*factors[: count - 1], torch.ones(2)]
    assert not known.are(others)
    assert known.are(others)
    others[-1].mul_(2)
    assert not known.are(others)


@pytest.mark.parametrize("structures", KEPT)
def test_a_layer_without_gradient_takes_its_products_along(structures: tuple[str, str]) -> None:
    """The others' are made again, in memory that held those of both."""

    def final(forget: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
        optimizer = SINGD(net, structures=structures, T=10, lr_cov=0.1)
        for seed in range(2):
            train_step(net, optimizer, seed)
        net[0].requires_grad_(False)
        for seed in range(2, 4):
            if forget:
                _, products, *_ = optimizer._gatherer.memory(0).tensors()
                products.resize_(0)
            train_step(net, optimizer, seed)
        return snapshot(net, optimizer)

    torch.testing.assert_close(final(False), final(True), rtol=0, atol=0)


@pytest.mark.parametrize("structure", ["diagonal", "block_diagonal:2", "hierarchical:1,1"])
def test_kept_products_bound_the_result_as_new_ones_do(structure: str) -> None:
    """A gradient that overflows when it is preconditioned is found by the norms that are kept."""
    net = nn.Linear(6, 4)
    optimizer = SINGD(net, structures=(structure, structure), T=10)
    net(torch.randn(9, 6)).square().mean().backward()
    optimizer.step()
    for factor in optimizer.factors()[""]:
        factor.data.mul_(1e8)
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e-30)
    optimizer.step()  # makes the products
    before = net.weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e25)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(net.weight, before)
    assert optimizer.rejections() == {"": (0, 1)}


def test_products_are_kept_where_they_save_work() -> None:
    """K Kᵀ of a wide factor is not worth one step with a narrow gradient, but three of them."""
    for dtype in (torch.float32, torch.float64):
        assert keeps_product(256, 1024, 1, dtype) and keeps_product(256, 256, 1, dtype)
        assert not keeps_product(1024, 256, 1, dtype) and keeps_product(1024, 256, 3, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        assert not keeps_product(256, 1024, 100, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [(), ("K",), ("C",), ("K", "C")], ids=str)
def test_a_step_with_dense_factors_and_some_kept_products(
    kept: tuple[str, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    d_o, d_i = 24, 40
    factors = {"K": torch.randn(d_i, d_i), "C": torch.randn(d_o, d_o)}
    factors = {name: (f / len(f) ** 0.5).to(dtype) for name, f in factors.items()}
    products = {
        name: [(f @ f.T).contiguous()] if name in kept else [] for name, f in factors.items()
    }
    gradient, weight = torch.randn(d_o, d_i).to(dtype), torch.zeros(d_o, d_i, dtype=dtype)
    none = torch.empty(0, dtype=dtype)
    ops.preconditioned_update_(
        [weight], [none], [], [], [torch.zeros((), dtype=torch.int64)], [gradient], [none],
        [factors["K"].flatten()], [factors["C"].flatten()], "dense", "dense",
        lr=torch.tensor(-1.0), momentum=0.0, weight_decay=0.0,
        P_K=products["K"], P_C=products["C"],
    )  # fmt: skip
    K, C = factors["K"], factors["C"]
    rival = C @ (C.T @ gradient) @ K @ K.T
    K, C = K.double(), C.double()
    assert_close_to_truth(weight, rival, C @ C.T @ gradient.double() @ K @ K.T)
