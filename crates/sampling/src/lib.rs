//! Logits to token: the sampler chain, penalties, counter-based Gumbel noise
