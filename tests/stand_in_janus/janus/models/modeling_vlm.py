import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.janus.modeling_janus import (
    JanusVisionAlignerMLP,
    JanusVQVAE,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)


class MultiModalityConfig(PretrainedConfig):
    model_type = "multi_modality"

    def __init__(self, **content):
        super().__init__(**content)
        self.language_config = LlamaConfig(**content.get("language_config", {}))


class VisionTransformer(SiglipVisionModel):
    """timm's way to ask a tower: by 0-based blocks, answered in their order."""

    @property
    def blocks(self):
        return self.encoder.layers

    def get_intermediate_layers(self, x, n=1, reshape=False, return_prefix_tokens=False, norm=False):
        h, outputs = self.embeddings(x), []
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        for i, block in enumerate(self.blocks):
            h = block(h, None)
            if i in wanted:
                outputs.append(self.post_layernorm(h) if norm else h)
        return tuple((h, h[:, :0]) for h in outputs) if return_prefix_tokens else tuple(outputs)

    def forward_head(self, x, pre_logits=False):
        return self.head(x)


class CLIPVisionTower(nn.Module):
    def __init__(self, vision_tower):
        super().__init__()
        self.vision_tower = vision_tower

    def forward(self, images):
        return self.vision_tower.get_intermediate_layers(images, norm=True)[0]


class VQModel(JanusVQVAE):
    def encode(self, x):  # pyright: ignore
        z = F.normalize(self.quant_conv(self.encoder(x)), dim=1)
        codebook = F.normalize(self.quantize.embedding.weight, dim=1)
        codes = torch.einsum("bchw,nc->bhwn", z, codebook).argmax(-1)
        return codebook[codes].permute(0, 3, 1, 2), None, (None, None, codes.flatten())

    def decode_code(self, code_b, shape, channel_first=True):
        codebook = F.normalize(self.quantize.embedding.weight, dim=1)
        z = codebook[code_b.long()].view(shape[0], shape[2], shape[3], shape[1])
        return self.decoder(self.post_quant_conv(z.permute(0, 3, 1, 2)))


class MultiModalityCausalLM(PreTrainedModel):
    """No `get_input_embeddings`, as in the original: that is the language model's."""

    config_class = MultiModalityConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vision, codes = config.vision_config["params"], config.gen_vision_config["params"]
        llama, width = config.language_config, config.language_config.hidden_size
        sizes = {
            "hidden_size": vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "gelu",
        }
        mlp = {"intermediate_size": int(vision["width"] * vision["mlp_ratio"]), "layer_norm_eps": 1e-6}
        vq = JanusVQVAEConfig(
            embed_dim=codes["n_embed"],
            num_embeddings=codes["image_token_size"],
            base_channels=codes["ch"],
            channel_multiplier=codes["ch_mult"],
            num_res_blocks=codes["num_res_blocks"],
            latent_channels=codes["z_channels"],
            double_latent=False,
            projection_dim=width,
            image_token_embed_dim=width,
            num_patches=vision["image_size"] // 2 ** (len(codes["ch_mult"]) - 1),
        )
        self.vision_model = CLIPVisionTower(VisionTransformer(SiglipVisionConfig(**sizes, **mlp)))
        self.aligner = JanusVisionAlignerMLP(JanusVisionConfig(**sizes, projection_dim=width, depth=2))
        self.gen_vision_model = VQModel(vq)
        self.gen_aligner = JanusVQVAEAlignerMLP(vq)
        self.gen_head = JanusVQVAEHead(vq)
        self.gen_embed = nn.Embedding(codes["image_token_size"], codes["n_embed"])
        self.language_model = LlamaForCausalLM(llama)
        self.post_init()

    def prepare_inputs_embeds(self, input_ids, pixel_values, images_seq_mask, images_emb_mask, **_) -> Tensor:
        features = self.aligner(self.vision_model(pixel_values.flatten(0, 1)))
        embeds = self.language_model.get_input_embeddings()(input_ids)
        embeds[images_seq_mask] = features[images_emb_mask.flatten(0, 1)]
        return embeds

    def prepare_gen_img_embeds(self, image_ids):
        return self.gen_aligner(self.gen_embed(image_ids))


AutoConfig.register("multi_modality", MultiModalityConfig)
AutoModelForCausalLM.register(MultiModalityConfig, MultiModalityCausalLM)
