"""What a graph means: regions, phase, modalities and workload, read off its structure."""
