"""GRU on the bytes of WikiText-103: the language model of the paper's section 4.2 and appendix I.

    rigl-optax train wikitext103_gru --workdir=runs/wikitext --config.data.dir=wikitext-103-raw

`data.dir`: folder of `wiki.train.raw` and so on, or its zip. An LSTM: --config.model.name=lstm.

From the paper: embedding 128, state 512, readout 256 and 128; Adam at 7e-4, L2 5e-4, sequences of
512, batches of 32, clipping at 10, 200,000 steps, 75 % sparse in all layers alike, alpha 0.1,
Delta T 100, until the end. Expected: the paper has plots only. Not run here: the data were not at
hand, and the reader is tested on files of that form.

The paper gives no code. It leaves open, decided here: logits tied to the embedding; ReLU between
the layers of the readout; the embedding dense; L2 as a term of the loss, on all kernels and the
embedding; clipping by the global norm; a constant learning rate; states carried from sequence to
sequence and reset where an article begins; raw bytes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = ConfigDict({"steps": 200_000, "batch_size": 32})
    keys.data = {"name": "wikitext103", "sequence_length": 512}
    keys.model = {"name": "gru", "hidden": (512,)}
    keys.method = {"name": "rigl", "sparsity": 0.75, "until": 1.0, "drop_fraction": 0.1}
    keys.method.distribution = {"name": "uniform"}
    keys.optimizer = {"name": "adam", "learning_rate": 7e-4, "schedule": "constant"}
    keys.optimizer.update({"gradient_clip": 10.0, "weight_decay": 5e-4})
    keys.update({"eval": {"every": 2_000, "batch_size": 64}, "checkpoint": {"every": 2_000}})
    return keys
