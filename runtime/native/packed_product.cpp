// Products of weights that are packed in the file.
#include "provider.h"

namespace elsa {

Type packed_type(const Unpacking& packed) {
    switch (packed.type) {
        case ort::kFloat16: return Type::f16;
        case ort::kBfloat16: return Type::bf16;
        case ort::kInt8: return Type::s8;
        default: return Type::f32;
    }
}

bool read_packed(const ort::Api& api, Product& product, std::string& why) {
    const Unpacking& packed = *product.packed;
    const auto sizes = attribute_list(api, packed.node, "shape", 3);
    if (sizes.size() != 2) {
        why = "a packed weight that is no matrix";
        return false;
    }
    if (packed.transposed == product.transposed) {
        why = "a weight packed along its outputs, wanted along its inputs";
        return false;
    }
    product.rows = packed.bits.rows;
    product.columns = packed.bits.columns;
    const bool whole = packed.type == ort::kInt8, halves = packed.type == ort::kFloat16 ||
                                                           packed.type == ort::kBfloat16;
    const bool quantised =
        product.widening != nullptr && is_operator(api, product.widening, "", "DequantizeLinear");
    const bool cast = product.widening != nullptr && !quantised;
    if (cast && attribute(api, product.widening, "to", std::int64_t{0}) != ort::kFloat) {
        why = "a weight cast to another type than float32";
        return false;
    }
    const bool fits = whole ? quantised : halves ? cast : packed.type == ort::kFloat && !quantised;
    if (!fits) {
        why = "a packed weight of a type the kernels do not multiply";
        return false;
    }
    if (!fills_with_zero(packed.bits)) {
        why = "a packed weight filled with something else than zero";
        return false;
    }
    if (product.columns > (whole ? kMaxColumnsS8 : kMaxColumns) || product.rows > kMaxRows) {
        why = "a weight larger than the kernels take";
        return false;
    }
    return !whole || read_scales(api, product, why);
}

}  // namespace elsa
