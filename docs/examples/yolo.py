"""YOLO networks of ultralytics for compress: how they are built, and how they are trained after pruning."""

from ultralytics import YOLO


def parts(cfg):  # classes of the network and of its trainer
    return (yolo := YOLO(cfg)).task_map[yolo.task]


def build(cfg, **kwargs):
    return parts(cfg)["model"](cfg, verbose=False, **kwargs)


def train(model, context, cfg, **settings):
    trainer = parts(cfg)["trainer"](overrides={"model": cfg, "project": str(context.folder), **settings})
    trainer.model = model  # else the trainer builds the network anew, from cfg
    trainer.train()
    return trainer.ema.ema.float()
