"""The parts of `mlx_mtp.server`: requests in OpenAI's form, the engine's thread, kept sessions, guards, metrics."""
