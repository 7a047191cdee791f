import pytest
import torch

from performer_lm.cost import BackendCost, Cost, Size
from performer_lm.training.callbacks.summary import describe_cost

COST = Cost(
    size=Size(parameters=4_479_392, embedding=524_288, trainable=4_479_392, buffers=65_536),
    flops=8_810_496.0,
    backends={BackendCost("favor", 232_448.0, 69_632): 4},
    softmax=BackendCost("flash", 262_656.0, 2**20),
    activation_bytes=70 * 2**20,
    pays_from=454,
)


def test_a_summary_tells_size_arithmetic_and_memory() -> None:
    text = describe_cost(COST, context=512, sequences=4, precision="bf16-mixed")
    assert "4,479,392: 524,288 in embeddings; 65,536 numbers in buffers" in text
    assert "8.81 MFLOP a token forward at context 512, in bf16-mixed" in text
    assert "about 280 MiB a step of 4 x 512 tokens" in text
    assert "4 x favor   232 kFLOP a token and layer, decoding state 68 KiB" in text
    assert "attn=flash  263 kFLOP a token and layer, decoding state 1 MiB" in text
    assert "note" not in text


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_products_of_float32_that_are_rounded_are_told(products: str) -> None:
    torch.set_float32_matmul_precision(products)
    try:
        text = describe_cost(COST, context=512, sequences=4, precision="32-true")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (f"in 32-true, products of float32 in {products} precision\n" in text) == (products != "highest")


def test_a_context_too_short_for_linear_attention_is_noted() -> None:
    text = describe_cost(COST, context=256, sequences=4, precision="bf16-mixed")
    assert text.splitlines()[-1].startswith("note: below 454 tokens softmax does less arithmetic: at data.context=256")
    assert "note" not in describe_cost(
        COST._replace(softmax=None, pays_from=None), context=2, sequences=1, precision="bf16-mixed"
    )


def test_frozen_parameters_are_told() -> None:
    size = COST.size._replace(trainable=COST.size.trainable - 1000)
    assert "1,000 frozen" in describe_cost(COST._replace(size=size), context=512, sequences=4, precision="bf16-mixed")
