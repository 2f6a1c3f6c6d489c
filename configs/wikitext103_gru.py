r"""GRU on the bytes of WikiText-103: the language model of the paper's section 4.2 and appendix I.

    python scripts/train.py --config=configs/wikitext103_gru.py --workdir=runs/wikitext \
        --config.data_dir=wikitext-103-raw

WikiText-103 raw (the folder with `wiki.train.raw` and so on, or its zip) was not reachable where
this was written: the reader is tested on files of that form, the recipe was not run.

From the paper: embedding 128, state 512, readout 256 and 128; Adam at 7e-4, L2 5e-4, sequences of
512, batches of 32, clipping at 10, 200,000 steps, 75 % sparse in all layers alike, alpha 0.1,
Delta T 100, until the end. The paper gives no code and leaves open, decided here: logits tied to
the embedding; ReLU between the layers of the readout; the embedding dense; L2 as a term of the
loss, on all kernels and the embedding; clipping by the global norm; a constant learning rate;
states carried from sequence to sequence and forgotten where an article begins; raw bytes.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """The recipe; `rigl_optax.training.config.Config` says what each key means."""
    return config_dict.ConfigDict(
        {
            "dataset": "wikitext103",
            "data_dir": "",
            "validation_fraction": 0.0,
            "image_size": 0,
            "augment": "none",
            "loader_threads": 1,
            "model": "gru",
            "hidden": (512,),
            "width": 1.0,
            "dense_layers": "default",
            "compute_dtype": "float32",
            "model_options": "",
            "sequence_length": 512,
            "method": "rigl",
            "sparsity": 0.75,
            "distribution": "uniform",
            "method_options": "",
            "ticket": "",
            "structure": "",
            "condensed": False,
            "rewire_every": 100,
            "rewire_until": 1.0,
            "drop_fraction": 0.1,
            "prune_from": 0.2,
            "steps": 200_000,
            "batch_size": 32,
            "optimizer": "adam",
            "learning_rate": 7e-4,
            "schedule": "constant",
            "warmup": 0.0,
            "decay_at": (),
            "decay_factor": 1.0,
            "momentum": 0.9,
            "gradient_clip": 10.0,
            "weight_decay": 5e-4,
            "weight_decay_on": "kernels",
            "label_smoothing": 0.0,
            "seed": 0,
            "log_every": 100,
            "eval_every": 2_000,
            "eval_batch_size": 64,
            "checkpoint_every": 2_000,
            "keep_checkpoints": 2,
            "mesh_data": 0,
            "mesh_params": 1,
            "mesh_axes": "auto",
            "compare_at_rewirings": False,
            "on_nonfinite": "stop",
            "max_rollbacks": 10,
            "max_bad_records": 0,
        }
    )
