"""Whole attention heads, in whatever layers and parameters a network keeps them.

All of this is ours. torch-pruning follows channels from operation to operation, and loses them
where a forward pass divides them among heads. Here the heads are read off autograd instead. Behind
every product with a softmax, or PyTorch's fused one, comes a layer whose inputs belong to one head
each; what has a gradient from one head's inputs alone is that head's: rows of queries, keys and
values, fused or not, their biases, columns of a table of positions. What heads share ties them
together, as a head of keys and values that serves several of queries; what all of them share stays.

``structures`` says what heads are, and removes them; ``search`` looks for them, with ``behind``,
which follows autograd's graph; ``numbers`` looks for the numbers of heads that modules keep.
"""

from .search import find
from .structures import Found, Heads, conv1d, owner, weight_dims

__all__ = ["Found", "Heads", "conv1d", "find", "owner", "weight_dims"]
