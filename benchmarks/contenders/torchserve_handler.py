"""A handler as TorchServe's documentation has them: one record a request, the batch stacked, the rest BaseHandler's.

Bytes are answered by bytes, JSON, which TorchServe has parsed, by JSON.
"""

import numpy as np
import torch
from ts.torch_handler.base_handler import BaseHandler


class ImageHandler(BaseHandler):
    def preprocess(self, data: list) -> torch.Tensor:
        bodies = [row.get("data") or row.get("body") for row in data]
        self.parsed = [isinstance(body, list) for body in bodies]
        images = np.stack([np.array(body, np.uint8) if parsed else np.frombuffer(body, np.uint8)
                           for body, parsed in zip(bodies, self.parsed, strict=True)])
        return torch.from_numpy(images.reshape(-1, 1, 28, 28)).to(self.device) / 255

    def postprocess(self, data: torch.Tensor) -> list:
        scores = torch.softmax(data, 1).cpu().numpy()
        return [row.tolist() if parsed else row.tobytes() for row, parsed in zip(scores, self.parsed, strict=True)]
