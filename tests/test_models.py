import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from msif_lib.study.models.networks import (
    PooledConv2d,
    build_model,
    feature_count,
    linear_head,
    mlp_head,
    tanh_cnn,
    tanh_mlp,
)


@pytest.mark.parametrize(
    "size, first",
    [
        ((8, 8), False),  # a matrix for all pixels
        ((7, 6), False),
        ((4, 4), True),
        ((14, 12), False),  # a convolution of stride two
        ((14, 12), True),  # a product over patches
        ((13, 12), True),
        ((12, 17), True),
    ],
)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_pooled_convolution_equals_convolution_then_pooling(size, first, kernel):
    torch.manual_seed(0)
    reference = nn.Conv2d(2, 3, kernel, padding=kernel // 2)
    torch.manual_seed(0)
    layer = PooledConv2d(2, 3, kernel, size, first)
    assert layer.state_dict().keys() == reference.state_dict().keys()
    assert torch.equal(layer.weight, reference.weight)
    assert torch.equal(layer.bias, reference.bias)
    inputs = torch.randn(5, 2, *size, dtype=torch.float64)
    expected = F.avg_pool2d(reference.double()(inputs), 2)
    torch.testing.assert_close(layer.double()(inputs), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side, first", [(8, False), (13, False), (13, True)])
def test_gradient_equals_that_of_convolution(side, first):
    layer = PooledConv2d(1, 4, 3, (side, side), first).double()
    reference = nn.Conv2d(1, 4, 3, padding=1).double()
    reference.load_state_dict(layer.state_dict())
    inputs = torch.randn(6, 1, side, side, dtype=torch.float64)
    layer(inputs).tanh().pow(2).sum().backward()
    F.avg_pool2d(reference(inputs), 2).tanh().pow(2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("side", [8, 20])
def test_many_models_at_once_and_second_derivatives_agree(side):
    embedding = tanh_cnn((1, side, side), channels=(2, 3), seed=1)
    inputs = torch.randn(7, 1, side, side, dtype=torch.float64)
    single = {name: value.detach() for name, value in embedding.named_parameters()}
    models = {
        name: value + 0.1 * torch.randn(4, *value.shape, dtype=value.dtype)
        for name, value in single.items()
    }

    def objective(parameters):
        return functional_call(embedding, parameters, (inputs,)).pow(2).mean()

    def double_backward(parameters, direction):
        def slope(point):
            gradient = grad(objective)(point)
            return sum((gradient[name] * direction[name]).sum() for name in gradient)

        return grad(slope)(parameters)

    together = vmap(grad(objective))(models)
    forward = vmap(lambda p: jvp(grad(objective), (p,), (p,))[1])(models)
    backward = vmap(lambda p: double_backward(p, {k: v.detach() for k, v in p.items()}))
    for name, value in backward(models).items():
        torch.testing.assert_close(forward[name], value, rtol=1e-10, atol=1e-13)
    for index in range(4):
        one = grad(objective)({name: value[index] for name, value in models.items()})
        for name, value in one.items():
            torch.testing.assert_close(together[name][index], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("architecture", ["cnn", "mlp"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_stages_fit_together(architecture, head, shape):
    embedding, pretrain_head, finetune_head = build_model(architecture, head, shape, 4, 6)
    features = embedding(torch.randn(2, *shape, dtype=torch.float64))
    assert features.shape == (2, feature_count(embedding, shape))
    assert pretrain_head(features).shape == (2, 4)
    assert finetune_head(features).shape == (2, 6)


def test_embedding_of_digits_is_small():
    for embedding in (tanh_cnn((1, 8, 8)), tanh_mlp((1, 8, 8))):
        assert 300 <= sum(p.numel() for p in embedding.parameters()) <= 600


def test_seed_decides_and_global_generator_stays():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_model("cnn", "mlp", (1, 8, 8), 4, 6, seed=3)
    second = build_model("cnn", "mlp", (1, 8, 8), 4, 6, seed=3)
    other = build_model("cnn", "mlp", (1, 8, 8), 4, 6, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    for a, b, c in zip(first, second, other):
        weights = [next(module.parameters()) for module in (a, b, c)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_dtype_reaches_every_parameter_and_buffer():
    for module in build_model("cnn", "linear", (1, 8, 8), 4, 6, dtype=torch.float32):
        tensors = [*module.parameters(), *module.buffers()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert linear_head(3, 2).weight.dtype == torch.float64
    assert mlp_head(3, 4, 2)[0].weight.dtype == torch.float64


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="architecture must be one of"):
        build_model("resnet", "linear", (1, 8, 8), 4, 6)
    with pytest.raises(ValueError, match="head must be one of"):
        build_model("cnn", "cubic", (1, 8, 8), 4, 6)
    with pytest.raises(ValueError, match="too small for 2 poolings"):
        tanh_cnn((1, 3, 3))
    with pytest.raises(ValueError, match="image_shape must be"):
        tanh_mlp((8, 8))
    with pytest.raises(ValueError, match="hidden must name"):
        tanh_mlp((1, 8, 8), hidden=())
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        PooledConv2d(1, 1, 2, (8, 8))
    with pytest.raises(ValueError, match="at least"):
        PooledConv2d(1, 1, 3, (1, 8))
    with pytest.raises(ValueError, match="made for"):
        PooledConv2d(1, 1, 3, (8, 8))(torch.zeros(1, 1, 6, 6))
