"""What generates completions.  An engine has

- `load_weights(buckets, version, shapes)`: the only way in which it gets weights,
- `generate(prompts, ...)`: G rollouts of each prompt, complete and in order on every rank,
- `score_prompts(prompts)`: log-probabilities of their tokens, complete and in order on every rank,
- `prompt_logprobs(tokens)`: what it makes of a text, by server, for `weight_sync.verify`,
- `fp32_lm_head`: whether its logits are float32: as it has them, not as it was told to have them,
- `weight_version`, `verified` and `close()`.
"""
