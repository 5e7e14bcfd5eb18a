import pytest
import torch
from cases import CASES, all_cases, forward_and_gradients, randn

pytest.importorskip('mmcv._ext', reason='the drop-in patches mmcv.ops')
import mmcv.ops  # noqa: E402
import mmengine.analysis  # noqa: E402
from mmcv.ops import carafe, carafe_naive  # noqa: E402

from mmcarafe import CARAFE, drop_in, ops  # noqa: E402


@pytest.fixture(autouse=True)
def enabled():
    drop_in.enable()


@all_cases
@pytest.mark.parametrize('theirs', [carafe, carafe_naive])
def test_mmcvs_functions_equal_ours(theirs, case):
    """Both names were imported before the drop-in was."""
    features, masks = randn(*case.features_shape), randn(*case.masks_shape)
    grad = randn(case.n, case.c, case.s * case.h, case.s * case.w)
    for result, expected in zip(
        forward_and_gradients(theirs, features, masks, grad, *case.arguments),
        forward_and_gradients(
            ops.carafe, features, masks, grad, *case.arguments
        ),
    ):
        assert torch.equal(result, expected)


def test_gradcheck_through_mmcv():
    case = CASES['groups-4-k3']._replace(h=2, w=2)
    features = randn(*case.features_shape).requires_grad_()
    masks = randn(*case.masks_shape).requires_grad_()
    torch.autograd.gradcheck(
        lambda x, m: carafe(x, m, *case.arguments), (features, masks)
    )


@pytest.mark.parametrize('cls', [mmcv.ops.CARAFE, mmcv.ops.CARAFENaive])
def test_mmcvs_modules(cls):
    x, masks = torch.randn(1, 4, 3, 5), torch.randn(1, 18, 6, 10)
    expected = ops.carafe(x, masks, 3, 2, 2)
    assert torch.equal(cls(3, 2, 2)(x, masks), expected)


def test_mmcvs_pack_equals_our_module():
    pack = mmcv.ops.CARAFEPack(8, 2, up_group=2)
    torch.nn.init.normal_(pack.content_encoder.weight)
    module = CARAFE(8, up_group=2)
    module.load_state_dict(pack.state_dict())
    x = torch.randn(2, 8, 5, 7)
    assert torch.equal(pack(x), module(x))


def test_a_subclass_of_the_pack_keeps_its_own_steps():
    class Sigmoid(mmcv.ops.CARAFEPack):
        def kernel_normalizer(self, mask):
            return torch.nn.functional.pixel_shuffle(mask, 2).sigmoid()

    pack, x = Sigmoid(8, 2), torch.randn(1, 8, 5, 7)
    module = CARAFE(8, normalizer='sigmoid')
    module.load_state_dict(pack.state_dict())
    torch.testing.assert_close(pack(x), module(x))


def test_a_pack_with_a_step_of_its_own():
    pack, x = mmcv.ops.CARAFEPack(8, 2), torch.randn(1, 8, 5, 7)
    pack.kernel_normalizer = lambda mask: mask.new_zeros(1, 25, 10, 14)
    assert not pack(x).any()


def test_code_written_for_mmcv():
    """Filters as FreqFusion's: S=1, several groups, masks made outside."""
    x, filters = torch.randn(2, 8, 6, 7), torch.randn(2, 4 * 9, 6, 7)

    def run(x, filters):
        x = x.requires_grad_()
        masks = filters.unflatten(1, (4, 9)).softmax(2).flatten(1, 2)
        out = x - carafe(x, masks, 3, 4, 1)
        return out, *torch.autograd.grad(out.square().sum(), x)

    exact = run(x.double(), filters.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-4)):
        for layout in (torch.contiguous_format, torch.channels_last):
            for result, want in zip(
                run(
                    x.to(dtype, memory_format=layout),
                    filters.to(dtype, memory_format=layout),
                ),
                exact,
            ):
                assert result.dtype == dtype
                torch.testing.assert_close(
                    result.double(), want, rtol=tolerance, atol=tolerance
                )


@pytest.mark.skipif(
    torch.__version__.startswith('2.1.'),
    reason='torch 2.1 does not compile a look into an instance',
)
def test_the_pack_compiles_into_one_graph():
    pack, x = mmcv.ops.CARAFEPack(8, 2), torch.randn(1, 8, 5, 7)
    torch._dynamo.reset()
    drop_in._announce.cache_clear()  # as in a run that begins with it
    compiled = torch.compile(pack, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), pack(x))


def test_its_operations_are_counted():
    """FlopCounterMode of torch, and mmengine's, by the import alone."""
    pack = mmcv.ops.CARAFEPack(8, 2)
    info = mmengine.analysis.get_model_complexity_info(
        pack, (8, 5, 7), show_table=False, show_arch=False
    )
    assert info['flops'] == 35 * (8 * 64 + 9 * 64 * 100 + 100 * 8)


def test_autocast_with_two_dtypes():
    x = torch.randn(1, 4, 3, 5, requires_grad=True)
    masks = torch.rand(1, 25, 6, 10, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        carafe(x, masks, 5, 1, 2).sum().backward()
    assert x.grad.dtype == torch.float32
    assert masks.grad.dtype == torch.bfloat16


def test_bad_input_reaches_our_checks():
    with pytest.raises(ValueError, match='masks has 24 channels, expected'):
        carafe(torch.zeros(1, 4, 3, 5), torch.zeros(1, 24, 6, 10), 5, 1, 2)


def test_it_can_be_undone():
    drop_in.disable()
    x, masks = torch.randn(1, 4, 3, 5), torch.randn(1, 25, 6, 10)
    with pytest.raises(RuntimeError, match='implementation for device cpu'):
        carafe(x, masks, 5, 1, 2)
    drop_in.enable()
    assert carafe(x, masks, 5, 1, 2).shape == (1, 4, 6, 10)
