"""The mixture of experts as a layer of Flax; the doors linen and nnx show it."""
