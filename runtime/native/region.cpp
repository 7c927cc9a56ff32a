#include "region.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

namespace elsa {
namespace {

constexpr std::size_t kNobody = ~std::size_t{0};

class Finder {
  public:
    Finder(std::vector<Candidate> nodes, bool between) : nodes_(std::move(nodes)) {
        for (std::size_t i = 0; i < nodes_.size(); ++i) {
            for (const std::string& value : nodes_[i].outputs) maker_[value] = i;
        }
        const std::size_t count = nodes_.size();
        parent_.resize(count);
        std::iota(parent_.begin(), parent_.end(), std::size_t{0});
        level_.resize(count, 0);
        ours_.resize(count, false);
        for (const std::size_t i : order()) place(i, between);
        if (between) join_neighbours();
        join_products_of_one_input();
    }

    std::vector<std::vector<const ort::Node*>> regions() {
        std::map<std::size_t, std::vector<std::size_t>> parts;
        for (std::size_t i = 0; i < nodes_.size(); ++i) {
            if (ours_[i]) parts[root(i)].push_back(i);
        }
        std::vector<std::vector<const ort::Node*>> found;
        for (const auto& [_, members] : parts) {
            const auto multiplies = [&](std::size_t i) { return nodes_[i].product; };
            if (std::none_of(members.begin(), members.end(), multiplies)) continue;
            found.emplace_back();
            for (const std::size_t i : members) {
                const Candidate& each = nodes_[i];
                found.back().insert(found.back().end(), each.helpers.begin(), each.helpers.end());
                found.back().push_back(each.node);
            }
        }
        return found;
    }

  private:
    std::size_t maker(const std::string& value) const {
        const auto found = maker_.find(value);
        return found == maker_.end() ? kNobody : found->second;
    }

    // Makers before readers.
    std::vector<std::size_t> order() const {
        std::vector<std::size_t> waiting(nodes_.size(), 0), ready, made;
        std::vector<std::vector<std::size_t>> readers(nodes_.size());
        for (std::size_t i = 0; i < nodes_.size(); ++i) {
            for (const std::string& value : nodes_[i].inputs) {
                if (maker(value) == kNobody) continue;
                readers[maker(value)].push_back(i);
                ++waiting[i];
            }
            if (waiting[i] == 0) ready.push_back(i);
        }
        while (!ready.empty()) {
            const std::size_t i = ready.back();
            ready.pop_back();
            made.push_back(i);
            for (const std::size_t reader : readers[i]) {
                if (--waiting[reader] == 0) ready.push_back(reader);
            }
        }
        return made;
    }

    // The level of a node is the number of changes between ours and not ours on the way to it, at
    // most. Nodes of ours on one level have nothing foreign between them: whatever leaves a level
    // never comes back to it. So parts of a level can be one node each without a circle.
    std::size_t level_of(std::size_t i, bool ours) const {
        std::size_t level = 0;
        for (const std::string& value : nodes_[i].inputs) {
            const std::size_t before = maker(value);
            if (before == kNobody) continue;
            level = std::max(level, level_[before] + (ours_[before] != ours ? 1 : 0));
        }
        return level;
    }

    void place(std::size_t i, bool between) {
        ours_[i] = nodes_[i].product || (between && nodes_[i].row && takes(i));
        level_[i] = level_of(i, ours_[i]);
    }

    // Norms are taken wherever they stand beside ours; anything else only behind ours, on the same
    // level: otherwise it is part of something that onnxruntime fuses in its own way.
    bool takes(std::size_t i) const {
        const RowNode& row = *nodes_[i].row;
        if (row.kind == RowOp::rms_norm || row.kind == RowOp::layer_norm) return true;
        const std::size_t level = level_of(i, true);
        bool behind = false;
        for (const std::string& value : row.inputs) {
            const std::size_t before = maker(value);
            const bool near = before != kNobody && ours_[before] && level_[before] == level;
            behind = behind || (near && (row.kind != RowOp::add_constant || nodes_[before].product));
        }
        if (!behind || row.inputs.size() < 2) return behind;
        return row.inputs[0] != row.inputs[1] && origin(row.inputs[0]) == origin(row.inputs[1]);
    }

    // The value whose leading sizes a value has, as far back as that is certain.
    std::string origin(std::string value) const {
        for (;;) {
            const std::size_t i = maker(value);
            if (i == kNobody || nodes_[i].rows_of < 0) return value;
            if (nodes_[i].row && nodes_[i].inputs.size() == 2 && !ours_[i]) return value;
            value = nodes_[i].inputs[static_cast<std::size_t>(nodes_[i].rows_of)];
        }
    }

    void join_neighbours() {
        for (std::size_t i = 0; i < nodes_.size(); ++i) {
            for (const std::string& value : nodes_[i].inputs) {
                const std::size_t before = maker(value);
                if (before != kNobody && ours_[i] && ours_[before] && level_[i] == level_[before]) {
                    join(i, before);
                }
            }
        }
    }

    void join_products_of_one_input() {
        std::map<std::string, std::size_t> first;
        for (std::size_t i = 0; i < nodes_.size(); ++i) {
            if (!nodes_[i].product) continue;
            const auto [found, fresh] = first.emplace(nodes_[i].inputs[0], i);
            if (!fresh) join(i, found->second);
        }
    }

    std::size_t root(std::size_t i) {
        while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
        return i;
    }

    void join(std::size_t a, std::size_t b) { parent_[root(a)] = root(b); }

    std::vector<Candidate> nodes_;
    std::map<std::string, std::size_t> maker_;
    std::vector<std::size_t> parent_, level_;
    std::vector<bool> ours_;
};

}  // namespace

std::vector<std::vector<const ort::Node*>> find_regions(std::vector<Candidate> nodes,
                                                        bool between) {
    return Finder(std::move(nodes), between).regions();
}

}  // namespace elsa
