"""The network: functions of tokens, layers, conditioning, blocks, stacks, and the DiT."""
