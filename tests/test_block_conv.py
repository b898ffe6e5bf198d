"""The convolution kernels without a GPU: compiled for several, their plain reference against a
dense convolution, the order of the input's gradient, and what is refused. Their results are checked
in tests/kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import GPUS, MAIN_GPUS, Compiled, assert_fits, compile_kernel, version
from torch import Tensor

from triton_kernels import block_conv, gather, scatter, tuning
from triton_kernels import block_conv_reference as reference
from triton_kernels.require import interpreting

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIDES = (16, 32, 64, 128)
BLOCKS = [(bh, bw) for bh in SIDES for bw in SIDES]
KERNELS = ("forward", "input_gradient", "weight_gradient")
OTHER_GPUS = [gpu for gpu in GPUS if gpu not in MAIN_GPUS]
THREE = {"KERNEL_W": 3, "STRIDE": 1, "PADDING": 1, "DILATION": 1}
STRIDED = {"KERNEL_W": 3, "STRIDE": 2, "PADDING": 1, "DILATION": 1}
POINTWISE = {"KERNEL_W": 1, "STRIDE": 1, "PADDING": 0, "DILATION": 1}
WIDE = {"KERNEL_W": 5, "STRIDE": 3, "PADDING": 2, "DILATION": 2}
GEOMETRIES: list[tuple[tuple[int, int], ...]] = [
    # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 2), (2, 1), (1, 0), (1, 2)),
    ((2, 3), (3, 2), (2, 1), (2, 1)),
]


def compile_conv(
    kernel: str,
    gpu: str,
    dtype: str,
    block: tuple[int, int],
    geometry: dict[str, int] = THREE,
    *,
    tf32: bool = False,
    metadata: str = "i32",
    ones: dict[str, int] | None = None,
) -> Compiled:
    """With the types and the constants with which the launchers launch it; channels and strides are
    multiples of 16, but for ``ones``."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels import block_conv_kernel

    if gpu == "sm_100" and dtype != "fp32" and version(triton) < (3, 8):
        pytest.skip("Triton before 3.8 fails in its own layouts of Blackwell's tensor memory")
    launch = tuning.heuristic(f"conv_{kernel}", block, DTYPES[dtype], 1 << 16, GPUS[gpu][3])
    activations, weights, index = f"*{dtype}", f"*{dtype}", f"*{metadata}"
    image = ["batch", "height", "width", "channels", "x_stride_n", "x_stride_h", "x_stride_w"]
    output = ["out_h", "out_w", "n_out"]
    aligned = ["channels", "n_out", *image[4:]]
    arguments: dict[str, str | int] = {"KERNEL_W": geometry["KERNEL_W"]}
    for name in ("STRIDE", "PADDING", "DILATION"):
        arguments |= {f"{name}_H": geometry[name], f"{name}_W": geometry[name]}
    arguments |= {"BH": block[0], "BW": block[1], "TF32": tf32}
    arguments |= {"x_ptr": activations, "offsets_ptr": index, "slots_ptr": index}
    if kernel == "weight_gradient":
        function = block_conv_kernel.conv_weight_gradient_kernel
        strides = ["dy_stride", "grad_stride"]
        integers = [*image, *output, *strides, "n_rows", "chunk"]
        aligned += strides
        # Where positions are split among programs, their sums are float32.
        arguments |= {"dy_ptr": activations, "cols_ptr": index, "grad_ptr": "*fp32"}
        arguments |= {"GROUP": max(1, launch.tile_k // block[1]), "STEP": launch.tile_m}
        arguments |= {"SEARCHED": block_conv.SEARCHED}
    else:
        function = block_conv_kernel.conv_product_kernel
        integers = [*image, *output, "grid_h", "grid_w"]
        arguments |= {"values_ptr": weights, "index_ptr": index, "bias_ptr": weights}
        arguments |= {"y_ptr": activations, "TILE": launch.tile_m, "STEP": launch.tile_k}
        arguments |= {"INPUT_GRADIENT": kernel == "input_gradient", "RELU": False}
    arguments |= dict.fromkeys(integers, "i32") | (ones or {})
    return compile_kernel(
        function,
        gpu,
        arguments,
        tuple(name for name in aligned if isinstance(arguments[name], str)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_compiles_without_spills(gpu: str, kernel: str, dtype: str) -> None:
    compiled = compile_conv(kernel, gpu, dtype, (16, 16))
    assert_fits(compiled, gpu)
    if dtype != "fp32":
        product = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}[gpu]
        assert product in compiled.assembly
    if gpu.startswith("sm_"):
        # Full float32 precision: PTX names tf32 where it is used.
        assert "tf32" not in compiled.assembly
        # Activations are copied 16 bytes a lane.
        assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", compiled.assembly)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS[1:])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_every_block_compiles(gpu: str, kernel: str, dtype: str, block: tuple[int, int]) -> None:
    compiled = compile_conv(kernel, gpu, dtype, block)
    assert_fits(compiled, gpu)
    assert gpu != "sm_90" or dtype == "fp32" or "wgmma" in compiled.assembly


@pytest.mark.slow
@pytest.mark.parametrize("block", [(16, 16), (64, 32), (128, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", OTHER_GPUS)
def test_compiles_for_other_gpus(gpu: str, kernel: str, dtype: str, block: tuple[int, int]) -> None:
    assert_fits(compile_conv(kernel, gpu, dtype, block), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", MAIN_GPUS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_geometries_compile(gpu: str, kernel: str, dtype: str) -> None:
    for geometry in (POINTWISE, STRIDED, WIDE):
        assert_fits(compile_conv(kernel, gpu, dtype, (32, 32), geometry), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("block", [(16, 16), (64, 64)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_tf32_compiles(gpu: str, kernel: str, block: tuple[int, int]) -> None:
    compiled = compile_conv(kernel, gpu, "fp32", block, tf32=True)
    assert_fits(compiled, gpu)
    assert "tf32" in compiled.assembly


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_channel_and_wide_metadata_compile(kernel: str) -> None:
    """Triton compiles an integer that is 1 as a constant."""
    ones = {"channels": 1, "n_out": 1}
    assert_fits(compile_conv(kernel, "sm_90", "bf16", (16, 16), ones=ones), "sm_90")
    assert_fits(compile_conv(kernel, "sm_90", "bf16", (16, 16), metadata="i64"), "sm_90")


def random_weight(
    block: tuple[int, int], n_out: int, channels: int, kernel: tuple[int, int]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Mask (n_rows, n_cols), values, and (offsets, index, slots) by row and by column."""
    n_rows, across = -(-n_out // block[0]), -(-channels // block[1])
    mask = torch.rand(n_rows, kernel[0] * kernel[1] * across) < 0.5
    mask[n_rows // 2] = False
    rows, cols = mask.nonzero(as_tuple=True)
    slots = torch.randperm(rows.numel() + 2)[: rows.numel()].int()
    transposed = (cols * n_rows + rows).argsort()

    def offsets(counts: Tensor) -> Tensor:
        return F.pad(counts.cumsum(0), (1, 0)).int()

    by_row = [offsets(mask.sum(1)), cols.int(), slots]
    by_column = [offsets(mask.sum(0)), rows[transposed].int(), slots[transposed]]
    dense = torch.randn(n_out, kernel[0] * kernel[1], channels, dtype=torch.float64)
    values = gather(dense, *by_row, slots.numel() + 2, block)
    return mask, values, by_row, by_column


@pytest.mark.parametrize("block", [(2, 3), (4, 2)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_reference(geometry: tuple[tuple[int, int], ...], block: tuple[int, int]) -> None:
    """Against the convolution with the scattered weight, and its gradients."""
    channels, n_out, kernel = 7, 9, geometry[0]
    _, values, by_row, _ = random_weight(block, n_out, channels, kernel)
    capacity = values.shape[0]
    weight = scatter(values, *by_row, n_out, kernel[0] * kernel[1], channels)
    weight = weight.view(n_out, *kernel, channels).permute(0, 3, 1, 2).requires_grad_()
    x = torch.randn(2, channels, 7, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n_out, dtype=torch.float64)
    expected = F.conv2d(x, weight, bias, *geometry[1:])
    close = torch.testing.assert_close
    assert reference.output_size(x.shape, *geometry) == expected.shape[2:]
    y = reference.forward(x, values, *by_row, n_out, *geometry, bias)
    close(y, expected)
    close(reference.forward(x, values, *by_row, n_out, *geometry, bias, True), expected.relu())

    dy = torch.randn_like(expected)
    expected.backward(dy)
    close(reference.input_gradient(dy, values, *by_row, tuple(x.shape), *geometry), x.grad)
    dense = weight.grad.permute(0, 2, 3, 1).reshape(n_out, -1, channels)
    grad = reference.weight_gradient(x.detach(), dy, *by_row, capacity, block, *geometry)
    close(grad, gather(dense, *by_row, capacity, block))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_order_of_the_input_gradient(geometry: tuple[tuple[int, int], ...]) -> None:
    """Every alive block once, in the class of the positions that its tap meets."""
    kernel, stride, padding, dilation = geometry
    mask, _, by_row, by_column = random_weight((16, 16), 70, 40, kernel)
    n_rows, across = mask.shape[0], 3
    slot = torch.zeros(mask.shape, dtype=torch.int32)
    slot[mask] = by_row[2]
    order = block_conv.input_order(*by_column, n_rows, *geometry)
    assert all(part.dtype == torch.int32 for part in order)
    entry, offsets = 0, [0]
    for phase_h in range(stride[0]):
        for phase_w in range(stride[1]):
            for block in range(across):
                for tap in range(kernel[0] * kernel[1]):
                    at_h = phase_h + padding[0] - tap // kernel[1] * dilation[0]
                    at_w = phase_w + padding[1] - tap % kernel[1] * dilation[1]
                    if at_h % stride[0] or at_w % stride[1]:
                        continue
                    for row in mask[:, tap * across + block].nonzero().flatten().tolist():
                        assert order.tap_rows[entry] == tap * n_rows + row
                        assert order.slots[entry] == slot[row, tap * across + block]
                        entry += 1
                offsets.append(entry)
    assert order.offsets.tolist() == offsets
    assert order.tap_rows.numel() == order.slots.numel() == entry == int(mask.sum())


def test_what_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    values, metadata = torch.ones(1, 16, 16), [torch.zeros(2, dtype=torch.int32)] * 3
    x = torch.ones(2, 16, 4, 4)

    def forward(x: Tensor, values: Tensor, kernel: tuple[int, int] = (3, 3)) -> None:
        block_conv.forward(x, values, *metadata, 16, kernel)

    with pytest.raises(ValueError, match=r"\(16, 4, 4\) must be \(batch, channels, height, width"):
        forward(x[0], values)
    with pytest.raises(ValueError, match=r"not torch\.float64 and torch\.float64"):
        forward(x.double(), values.double())
    with pytest.raises(ValueError, match=r"not torch\.float16 and torch\.float32"):
        forward(x.half(), values)
    with pytest.raises(
        ValueError, match=r"block \(16, 8\) has no kernel: choose sides among 16, 3"
    ):
        forward(x, values[:, :, :8])
    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: kernels run on the CPU")
    with pytest.raises(ValueError, match=r"tensors on cpu and cpu .* move them to one GPU"):
        forward(x, values)


def test_sizes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    values, metadata = torch.ones(1, 16, 16), [torch.zeros(2, dtype=torch.int32)] * 3
    x = torch.ones(2, 16, 4, 4)
    with pytest.raises(ValueError, match=r"x \(2, 16, 4, 4\) is smaller than the kernel \(5, 3\)"):
        block_conv.forward(x, values, *metadata, 16, (5, 3))
    with pytest.raises(ValueError, match=r"dy \(2, 16, 4, 4\) must be \(2, n_out, 2, 2\)"):
        block_conv.input_gradient(x, values, *metadata, x.shape, (3, 3))
    with pytest.raises(ValueError, match=r"dy \(2, 16, 4, 4\) must be \(2, n_out, 6, 4\)"):
        block_conv.weight_gradient(x, x, *metadata, 1, (16, 16), (3, 3), padding=(2, 1))
    with pytest.raises(ValueError, match=r"2 offsets are not those .* 3 are"):
        block_conv.forward(x, values, *metadata, 17, (3, 3))
    with pytest.raises(ValueError, match=r"2 offsets are not those .* 5 are"):
        block_conv.input_gradient(x[..., :3, :3], values, *metadata, x.shape, (2, 2))
    with pytest.raises(ValueError, match=r"2 offsets are not those .* 1 are"):
        block_conv.weight_gradient(x, x[:, :0], *metadata, 1, (16, 16), (1, 1))
