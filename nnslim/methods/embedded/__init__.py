"""Networks for embedded boards (Embedded-ViT, Ostrowski and Shafique, ISVC 2024): four levers, alone and composed."""
