"""precscope inside the loops that others own. Each module needs its framework and says so where it is missing.

    transformers.py    Hugging Face Trainer, Accelerate
    lightning.py       Lightning's Trainer, Fabric
    keras.py           Keras 3 on the torch backend
    loggers.py         TensorBoard, Weights & Biases, MLflow

Nothing is imported here: `from precscope.integrations.lightning import RecordCallback`.
"""
