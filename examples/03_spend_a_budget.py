"""Spend a budget of bits over the layers of the demo's language model, and see what each layer got.

python examples/03_spend_a_budget.py
"""

import qe_edge
from qe_edge.budget.accounting import count_bits
from qe_edge.layers.linear import quantized_linears
from qe_edge.validate.subjects import block_groups

BITS = 3.75  # stored bits per weight, with everything that belongs to a layer


def main() -> None:
    """Print one line for every layer of the first block, and the mean over all layers."""
    recipe = qe_edge.make_recipe(
        scheme="w4a8", budget={"bits": BITS}, calibration={"samples": 8}, options={"tokens": 512}
    )
    loaded, _ = qe_edge.quantize("demo", recipe)
    layers, bits = quantized_linears(loaded.model), count_bits(loaded.model, block_groups(loaded))
    for one in bits.layers:
        if ".layers.0." in one.name:
            layer = layers[one.name]
            rank = layer.rank_shared + layer.num_experts * layer.rank_routed
            print(f"{one.name:52} {layer.weight_bits}-bit codes, rank {rank:3}: {one.bits.stored_bits:.2f} bits")
    print(f"{len(layers)} layers and the head's matrix have {bits.total.stored_bits:.2f} bits per weight.")
    print(f"The budget was {BITS}.")


if __name__ == "__main__":
    main()
