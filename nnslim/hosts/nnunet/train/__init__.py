"""Trainers: fine-tuning, and the methods that work while a network trains."""
