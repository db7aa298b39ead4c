"""How the page looks and which keys it knows: colours that pass WCAG AA on light and dark, and fonts of the system."""

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).parent
CSS, SCRIPT = FOLDER / "page.css", FOLDER / "page.js"
TEXT_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
CODE_FONTS = ["ui-monospace", "Consolas", "monospace"]


def theme() -> gr.Theme:
    """Blue on neutral; no font is loaded from anywhere."""
    base = gr.themes.Base(
        primary_hue="blue", secondary_hue="slate", neutral_hue="slate", font=TEXT_FONTS, font_mono=CODE_FONTS
    )
    return base.set(
        color_accent="#1d4ed8",
        border_color_primary="#cbd5e1",
        border_color_primary_dark="#334155",
        body_background_fill="#f8fafc",
        body_background_fill_dark="#0b1120",
        body_text_color="#0f172a",
        body_text_color_dark="#e2e8f0",
        body_text_color_subdued="#475569",
        body_text_color_subdued_dark="#a8b5c7",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_label_text_color="#334155",
        block_label_text_color_dark="#cbd5e1",
        block_title_text_color="#1e293b",
        block_title_text_color_dark="#e2e8f0",
        block_info_text_color="#475569",
        block_info_text_color_dark="#a8b5c7",
        block_padding="4px 0",
        layout_gap="10px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#111a2e",
        input_border_color="#94a3b8",
        input_border_color_dark="#475569",
        input_border_width="1px",
        input_placeholder_color="#64748b",
        input_placeholder_color_dark="#94a3b8",
        button_primary_background_fill="#1d4ed8",
        button_primary_background_fill_hover="#1e40af",
        button_primary_background_fill_dark="#1d4ed8",
        button_primary_background_fill_hover_dark="#2563eb",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#e2e8f0",
        button_secondary_background_fill_hover="#cbd5e1",
        button_secondary_background_fill_dark="#1e293b",
        button_secondary_background_fill_hover_dark="#334155",
        button_secondary_text_color="#0f172a",
        button_secondary_text_color_dark="#e2e8f0",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover_dark="#dc2626",
        button_cancel_text_color="#ffffff",
        button_cancel_text_color_dark="#ffffff",
        checkbox_background_color_selected="#1d4ed8",
        checkbox_background_color_selected_dark="#3b82f6",
        checkbox_label_background_fill_selected="#dbeafe",
        checkbox_label_background_fill_selected_dark="#1e3a8a",
        checkbox_label_text_color_selected="#0f172a",
        checkbox_label_text_color_selected_dark="#f1f5f9",
        slider_color="#1d4ed8",
        slider_color_dark="#3b82f6",
    )


def head() -> str:
    """What stands in the page's head: nothing that is fetched from elsewhere."""
    return '<meta name="color-scheme" content="light dark"><meta name="referrer" content="same-origin">'
