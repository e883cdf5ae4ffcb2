"""The front door: train or evaluate anything in this repository from a config.

One process, whatever accelerator there is:

    python train.py fit --config configs/<study>/base.yaml

Layers and single values, later ones win (``callbacks+:`` in a layer appends to the list):

    python train.py fit --config configs/<study>/base.yaml --config configs/<study>/<experiment>.yaml --model.lr=1e-4

Eight GPUs of one machine, started by Lightning or by torchrun:

    python train.py fit --config configs/<study>/base.yaml --trainer.devices=8
    torchrun --nproc_per_node=8 train.py fit --config configs/<study>/base.yaml --trainer.devices=8

A laptop without a GPU, two batches of everything to see that it works:

    python train.py fit --config configs/<study>/base.yaml --trainer.accelerator=cpu --trainer.fast_dev_run=2

Continue an interrupted run; evaluate a checkpoint; see every option and value:

    python train.py fit --config runs/x/config.yaml --run_dir=runs/x --ckpt_path=runs/x/checkpoints/<file>.ckpt
    python train.py validate --config runs/x/config.yaml --ckpt_path=runs/x/checkpoints/<file>.ckpt
    python train.py fit --config configs/<study>/base.yaml --print_config

Each run has its own folder (``--run_dir``, default ``runs/<config>/<time>``) with the resolved config, a manifest, the metrics as JSON
lines and the checkpoints. The ``theodolite`` command and ``python -m theodolite`` do the same from any folder.
"""

if __name__ == "__main__":
    try:
        from theodolite.cli import main
    except ModuleNotFoundError as error:
        if error.name != "theodolite":
            raise
        raise SystemExit("theodolite is not installed: run `make setup` and use .venv/bin/python, or `pip install -e .`.") from None
    main()
