"""Compare methods on the demo model: bits per weight beside the divergence from the original's predictions.

    python examples/02_compare_methods.py

`benchmarks/methods.py` does the same on more questions, with accuracy, for any model.
"""

import qe_edge
from qe_edge.budget.accounting import count_bits
from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.loading import load_model
from qe_edge.validate.comparison import Comparison
from qe_edge.validate.subjects import block_groups, in_float32

QUESTIONS = 40


def main() -> None:
    """Print a table of methods."""
    original = in_float32(load_model("demo"))
    questions = load_evaluation("demo")[:QUESTIONS]
    print("method   stored bits   read bits   KL on answer tokens")
    for method in ("rtn", "gptq", "qe"):
        recipe = qe_edge.make_recipe(method=method, scheme="w4a8", calibration={"samples": 32})
        quantized, _ = qe_edge.quantize("demo", recipe)
        bits = count_bits(quantized.model, block_groups(quantized)).total
        comparison = Comparison(original, in_float32(quantized), None)
        comparison.measure_heldout(questions, lambda _: None)
        divergence = comparison.distances["quantized"].answer.mean_divergence()
        print(f"{method:6}   {bits.stored_bits:11.2f}   {bits.read_bits:9.2f}   {divergence:.1e}")


if __name__ == "__main__":
    main()
