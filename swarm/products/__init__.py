"""Matrix products with weights as this processor is fastest with them.

A decoding step is a handful of rows times every weight of the model, and reading the weights is most of it.

- ``linear.PackedLinear`` stands in for linear layers; ``fuse``, ``rounded_layers`` and ``separate`` put it in place.
- ``formats`` are weights in fewer bits.
- ``loops`` computes with them on any processor.
- ``choice`` says, by trying, which of PyTorch's products and those loops is faster here.
"""
