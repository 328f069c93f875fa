"""torch's own test databases, real architectures and real training, each run compiled against eager.

A case makes everything it needs from a seed, runs once eagerly and once through `torch.compile(backend=...)`, and
compares all that a user could see: values, dtypes, strides, aliasing, side effects, gradients, generator state.
"""
