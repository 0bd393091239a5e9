"""Self-distillation: a student learns to predict the prototype assignments of its own moving average, the teacher."""
