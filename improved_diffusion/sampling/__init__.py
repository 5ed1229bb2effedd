"""From noise to frames and from frames to whole videos: the denoiser, samplers, strategies at work."""
