"""A YOLO detector of ultralytics for compress: how it is built, and how it is trained after pruning."""

from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel


def build(cfg="yolov8n.yaml", classes=80):
    return DetectionModel(cfg, nc=classes, verbose=False)


def train(model, context, **settings):
    place = {"project": str(context.folder), "name": "train", "exist_ok": True}
    trainer = DetectionTrainer(overrides={"model": "yolov8n.yaml", **place, **settings})
    trainer.model = model  # else the trainer builds the network anew, from that file
    trainer.train()
    return trainer.ema.ema.float()
