"""The settings that the job tests train with: seconds, not quality."""

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False}
TRAIN = {"per_device_train_batch_size": 16, "max_steps": 3, "gradient_checkpointing": False, "max_length": 64}
