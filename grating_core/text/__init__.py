"""From texts to tokens and back: tokenizers, pairs, prompts, chats."""
