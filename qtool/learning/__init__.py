"""Steps that learn: gradient descent on what a format stores as real numbers, and on roundings.

`weights.py` makes the parameters of a block differentiable in what is learned of them, `block.py` trains one block
against the unquantized one (the step tune), `whole.py` the chain of them against the model's logits (distill).
"""
