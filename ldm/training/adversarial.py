"""The autoencoder against a discriminator of patches, in one step of both (Esser et al. 2021, Section 3.1)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ldm.models.discriminator import PatchDiscriminator
from ldm.training.update import Losses
from ldm.training.workers import workers

MOST_ADAPTIVE_WEIGHT = 1e4
TINY = 1e-4


class Adversarial(nn.Module):
    """Autoencoder and discriminator in one module, so that one forward pass gives all that both losses need."""

    def __init__(self, reconstruction: nn.Module, discriminator: PatchDiscriminator, last_layer: nn.Parameter) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.discriminator = discriminator
        self._last = [last_layer]  # in a list: it is the reconstruction's parameter, not a second one

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer: where the pulls of the two losses are compared."""
        return self._last[0]

    def forward(
        self, image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b z h8 w8"], scale: float, turns: int
    ) -> tuple[Tensor, ...]:
        """The reconstruction's own outputs, then logits: of its output as a fixed judge sees it, of target and output.

        Through the first the autoencoder learns and the judge does not; through the others the judge alone.
        """
        output, target, kl = self.reconstruction(image, noise, scale, turns)
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        judged = functional_call(self.discriminator, fixed, (output,))
        real, fake = self.discriminator(torch.cat([target, output.detach()])).chunk(2)
        return output, target, kl, judged, real, fake


def adversarial_losses(
    reconstruction: Float[Tensor, ""], verdicts: list[Tensor], last_layer: nn.Parameter, weight: float
) -> Losses:
    """The hinge losses of both sides, added as "loss", from the logits of `Adversarial.forward`.

    The decoder's is weighted so that it pulls `weight` times as hard on the last layer as the reconstruction's.
    At weight 0 neither learns.
    """
    judged, real, fake = (logits.float() for logits in verdicts)
    fooling = -judged.mean()
    telling = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    adaptive = adaptive_weight(reconstruction, fooling, last_layer) if weight else fooling.new_zeros(())
    loss = weight * adaptive * fooling + (telling if weight else 0.0 * telling)
    return {"loss": loss, "fooling": fooling, "discriminator": telling, "adaptive_weight": adaptive}


def adaptive_weight(
    reconstruction: Float[Tensor, ""], fooling: Float[Tensor, ""], last_layer: nn.Parameter
) -> Float[Tensor, ""]:
    """‖∇ reconstruction‖ / (‖∇ fooling‖ + 10⁻⁴) at the last layer, at most 10⁴ (Esser et al. 2021, Equation 7).

    Gradients are averaged over all processes first: the norm is that of the global batch.
    """
    me = workers()
    norms = []
    for loss in (reconstruction, fooling):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(me.mean_tensor(gradient).norm())
    return (norms[0] / (norms[1] + TINY)).clamp(0.0, MOST_ADAPTIVE_WEIGHT).detach()
