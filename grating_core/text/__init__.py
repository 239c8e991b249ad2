"""This room turns texts into tokens and back: tokenizers, pairs, prompts, chats."""
