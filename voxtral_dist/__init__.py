"""Multi-GPU multitask fine-tuning and evaluation of the Voxtral speech LLM."""

__version__ = "0.1.0"
