"""What attends in a model: registered with transformers, told by the plan of a call, and watched."""
