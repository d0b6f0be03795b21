"""Learning from one's own texts: PPO, GRPO and RLOO over several models, each on its ranks and in its layout."""
