"""The paper's comparison of a ResNet-18 with its plain twin."""
