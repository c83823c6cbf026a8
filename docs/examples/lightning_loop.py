"""Fine-tuning with Lightning: `finetune: {own: "lightning_loop.py:train", kwargs: {epochs: 10}}`."""

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Finetune(lightning.LightningModule):
    """Cross-entropy, and the distance to the logits of the unpruned network."""

    def __init__(self, model, teacher, rate):
        super().__init__()
        self.model, self.rate = model, rate
        self.teacher = [teacher]  # in a list: no part of this module, so that checkpoints stay small

    def training_step(self, batch, _):
        images, labels = batch
        with torch.no_grad():
            taught = self.teacher[0](images)
        outputs = self.model(images)
        return F.cross_entropy(outputs, labels) + F.mse_loss(outputs, taught)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.model.parameters(), self.rate, momentum=0.9, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def train(model, context, epochs=3, rate=0.01, batch_size=64):
    lightning.seed_everything(context.seed)
    saved = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=context.folder, filename="last", every_n_epochs=1)
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=context.folder, callbacks=[saved], logger=False)
    last = context.folder / "last.ckpt"
    trainer.fit(
        Finetune(model, context.teacher, rate),
        DataLoader(context.dataset("train"), batch_size, shuffle=True),
        ckpt_path=last if last.exists() else None,  # a run that was killed goes on from its last epoch
    )
    return model
