"""Makes resnet.safetensors: the state dict of a small residual network of PyTorch, with what PyTorch computes of one input.

    pip install torch safetensors numpy
    python make_resnet.py

The modules have the names of torchvision's ResNet, so that the entries do: conv1.weight, bn1.running_mean,
layer1.0.bn1.weight, layer2.0.downsample.1.bias, fc.weight and so on. Eight steps of training on random images give the
norm layers running statistics that mean something. Beside the state dict the file holds

    example.input         two images, [2, 3, 16, 16]
    example.eval          the network's output in evaluation
    example.train         the network's output in training, by the statistics of these two images
    example.bn1.running_mean, example.bn1.running_var      of bn1 after that training pass

all computed on the CPU, in float32, on one thread.
"""
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + residual)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean(dim=(2, 3)))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    network = ResNet()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(8):
        images, labels = torch.randn(16, 3, 16, 16) * 2 + 1, torch.randint(10, (16,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    entries = {name: value.clone() for name, value in network.state_dict().items()}

    with torch.no_grad():
        images = torch.randn(2, 3, 16, 16) * 2 + 1
        entries["example.input"] = images
        network.eval()
        entries["example.eval"] = network(images)
        network.train()
        entries["example.train"] = network(images)
        entries["example.bn1.running_mean"] = network.bn1.running_mean.clone()
        entries["example.bn1.running_var"] = network.bn1.running_var.clone()

    path = pathlib.Path(__file__).with_name("resnet.safetensors")
    save_file(entries, path, metadata={"format": "pt", "made_by": f"make_resnet.py with torch {torch.__version__}"})
    print(f"{path.name}: {len(entries)} entries, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
