"""Fast paths behind the models and losses; the models read without them.

- `device`: whether GPU kernels apply, and copies to a GPU that do not block the processor.
- `documents`, `buckets`: two layouts of packed documents, on segments of 64 tokens and by similar length.
- `tiled_attention`: attention by plain matrix products on any device, with a backward pass of its own.
- `state_passing`, `state_passing_triton`: the recurrence of the EMA between segments.
- `cross_entropy`, `cross_entropy_triton`: logits to losses and gradients, in place.
- `dropout`: dropout whose random bits are cheap on a CPU.
"""
