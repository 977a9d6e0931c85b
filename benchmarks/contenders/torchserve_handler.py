"""A handler as TorchServe's documentation has them: one record a request, the batch stacked, the rest BaseHandler's."""

import numpy as np
import torch
from ts.torch_handler.base_handler import BaseHandler


class ImageHandler(BaseHandler):
    def preprocess(self, data: list) -> torch.Tensor:
        bodies = (row.get("data") or row.get("body") for row in data)
        images = np.stack([np.frombuffer(body, np.uint8).reshape(1, 28, 28) for body in bodies])
        return torch.from_numpy(images).to(self.device) / 255

    def postprocess(self, data: torch.Tensor) -> list:
        return [scores.tobytes() for scores in torch.softmax(data, 1).cpu().numpy()]
